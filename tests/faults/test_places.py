"""Where a start writes: it needs no /dev/shm, no short names, and leaves nothing with a name."""

import json
import os

import pytest
from faults.cases import case
from faults.conftest import Observe
from process.conftest import TESTS

from support.namespaces import python_with_own_mounts
from support.paths import REPOSITORY

pytestmark = [pytest.mark.process, pytest.mark.rotates(2)]

# Real ranks, two at a time; the fork server is the same for all.
CODE = r"""
import json, os, subprocess, sys, time
from pathlib import Path

sys.path[:0] = {paths!r}
from process.conftest import cpu_group
from tp_runtime.client.engine import Engine
from tp_runtime.client.launch.local import LocalLauncher

def run(command):
    subprocess.run(command, shell=True, check=True)

STATES = {{
    "TMPDIR and TP_RUNTIME_HOME have odd names": "true",
    "the state folder is full": "mkdir full && mount -t tmpfs -o size=64k none full && "
    "head -c 65536 /dev/zero > full/x",
    "/dev/shm is full": "mount -t tmpfs -o size=4k none /dev/shm && "
    "head -c 4096 /dev/zero > /dev/shm/x",
    "/dev/shm is read-only": "mount -t tmpfs -o ro none /dev/shm",
    # Only what any program needs of /dev.
    "/dev/shm is absent": "mkdir dev && mount -t tmpfs none dev && cd dev && "
    "for name in null zero urandom random full; do touch $name && mount -B /dev/$name $name; done "
    "&& cd .. && mount --move dev /dev",
}}
os.chdir(sys.argv[1])
os.environ["TMPDIR"] = sys.argv[1] + "/" + "a long name " * 10
os.makedirs(os.environ["TMPDIR"])
home = os.environ["TP_RUNTIME_HOME"]
cpu = cpu_group(2, start_timeout_s=400.0)
LocalLauncher().prepare(cpu, lambda: None)  # so that the fork server is up
for state, command in STATES.items():
    run(command)
    os.environ["TP_RUNTIME_HOME"] = "full" if "state folder" in state else home
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    began = time.monotonic()
    engine = Engine(cpu)
    engine.start()
    took_s = time.monotonic() - began
    seen = [ready.tp_world_size for ready in engine.processes.ready]
    after = set(shared.iterdir()) if shared.exists() else set()
    named = [str(path) for path in (after - before) | set(Path(os.environ["TMPDIR"]).iterdir())]
    engine.close()
    print(json.dumps([state, seen, named, took_s]), flush=True)
"""
STATES = (
    "TMPDIR and TP_RUNTIME_HOME have odd names",
    "the state folder is full",
    "/dev/shm is full",
    "/dev/shm is read-only",
    "/dev/shm is absent",
)

Outcome = tuple[list[int], list[str], float]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Of each state: the ranks that were up, what had a name while they were, and the seconds."""
    # Of a home that torch and a codec would misread.
    home = os.fsdecode(os.fsencode(tmp_path_factory.mktemp("home")) + b"/a#b?c:d%20\xff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", home)
        code = CODE.format(paths=[str(REPOSITORY), str(TESTS)])
        done = python_with_own_mounts(code, str(tmp_path_factory.mktemp("places")))
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    return {state: (seen, named, took_s) for state, seen, named, took_s in rows}


@pytest.mark.parametrize("state", STATES)
def test_a_start_takes_nothing_that_has_a_name(
    outcomes: dict[str, Outcome], observe: Observe, state: str
) -> None:
    ranks, named, took_s = outcomes[state]
    observe(case("start", state), took_s)
    assert ranks == [2, 2]
    assert named == []
