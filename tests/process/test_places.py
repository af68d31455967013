"""Where a start writes: it needs no /dev/shm, no short names, and leaves nothing with a name."""

import json
import os

import pytest
from process.conftest import TESTS

from support.namespaces import python_with_own_mounts
from support.paths import REPOSITORY

pytestmark = pytest.mark.process

# Real ranks, two at a time; the fork server is the same for all.
CODE = r"""
import json, os, subprocess, sys
from pathlib import Path

sys.path[:0] = {paths!r}
from process.conftest import cpu_group
from tp_runtime.client.engine import Engine

def run(command):
    subprocess.run(command, shell=True, check=True)

STATES = {{
    "as it is": "true",
    "full": "mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/x",
    "read-only": "mount -t tmpfs -o ro none /dev/shm",
    # Only what any program needs of /dev.
    "absent": "mkdir /tmp/dev && mount -t tmpfs none /tmp/dev && cd /tmp/dev && "
    "for name in null zero urandom random full; do touch $name && mount -B /dev/$name $name; done "
    "&& cd / && mount --move /tmp/dev /dev",
}}
run("mount -t tmpfs none /tmp")
os.environ["TMPDIR"] = "/tmp/" + "a long name " * 10
os.makedirs(os.environ["TMPDIR"])
for state, command in STATES.items():
    run(command)
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    engine = Engine(cpu_group(2))
    engine.start()
    seen = [ready.tp_world_size for ready in engine.processes.ready]
    after = set(shared.iterdir()) if shared.exists() else set()
    named = [str(path) for path in (after - before) | set(Path(os.environ["TMPDIR"]).iterdir())]
    engine.close()
    print(json.dumps([state, seen, named]), flush=True)
"""
STATES = ("as it is", "full", "read-only", "absent")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], list[str]]]:
    """Of each state of /dev/shm: the ranks that were up, and what had a name while they were."""
    # Of a home that torch and a codec would misread.
    home = os.fsdecode(os.fsencode(tmp_path_factory.mktemp("home")) + b"/a#b?c:d%20\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", home)
        done = python_with_own_mounts(CODE.format(paths=[str(REPOSITORY), str(TESTS)]))
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {state: (seen, named) for state, seen, named in rows}


@pytest.mark.parametrize("state", STATES)
def test_a_start_takes_nothing_that_has_a_name(
    outcomes: dict[str, tuple[list[int], list[str]]], state: str
) -> None:
    """Whether /dev/shm is full, read-only or absent, and however long TMPDIR is."""
    ranks, named = outcomes[state]
    assert ranks == [2, 2]
    assert named == []
