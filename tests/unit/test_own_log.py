"""A log that has grown too long is cut, and one that cannot be is left as it is."""

import subprocess
import sys
from pathlib import Path

from tp_runtime.wire.own_log import KEPT_LOG_BYTES, MAX_LOG_BYTES

NO_FILE_MAY_BE_OPENED = """
import resource
from tp_runtime.wire.own_log import shorten_own_log

files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
shorten_own_log()
print("uncut", flush=True)
resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
shorten_own_log()
print("cut", flush=True)
"""


def test_what_the_system_refuses_is_done_later(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"x" * MAX_LOG_BYTES + b"the end\n")
    with open(log, "ab") as appended:
        subprocess.run(
            [sys.executable, "-c", NO_FILE_MAY_BE_OPENED], stdout=appended, check=True, timeout=60
        )
    first, rest = log.read_bytes().split(b"\n", 1)
    assert first == b"(what came before was too long)"
    assert len(rest) == KEPT_LOG_BYTES + len(b"cut\n")
    assert rest.endswith(b"xthe end\nuncut\ncut\n")
