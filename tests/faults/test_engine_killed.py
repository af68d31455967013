"""`kill -9` of the engine's process at random moments: its ranks are gone soon each time.

Sixteen times, or as often as `KILLS` says (`make kills`: fifty times). The process does with
tp_runtime what ComfyUI's does, on ranks that compute nothing, and is forked from one that has
imported everything. `test_comfyui_killed.py` kills a real ComfyUI.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from signal import SIGKILL

import pytest
from faults.cases import case
from faults.conftest import Observe
from process.conftest import TESTS, PythonWith, assert_ended, assert_nothing_left, ranks_of

from support.paths import REPOSITORY
from support.workers import stalled_s

pytestmark = [pytest.mark.process, pytest.mark.rotates(3, "random moments")]

COUNT = int(os.environ.get("KILLS", "16"))
ROW = case("any", "a process with a group is killed")
# How long a group that is up lives on, at most: it computes, sleeps and wakes the whole time.
UP_S = 0.4

ENGINES = """
import os, sys
sys.path[:0] = {paths!r}
from process.conftest import cpu_group, make_inputs
from tp_runtime.client import ModelSpec, Runtime

def live():
    model = Runtime().model(ModelSpec.of({file!r}, "float32", "float32"), config)
    model.ensure_loaded()
    print("up", flush=True)
    while True:
        model.evaluate(make_inputs())
        model.sleep()
        model.ensure_loaded()

config = cpu_group(1, python={python!r})
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        live()
    print(pid, flush=True)
    os.waitpid(pid, 0)
"""


def test_at_any_moment(
    home: Path, python_with: PythonWith, tiny_z_image: Path, observe: Observe
) -> None:
    code = ENGINES.format(
        paths=[str(REPOSITORY), str(TESTS)], python=python_with(), file=str(tiny_z_image)
    )
    random = Random(0)
    slowest_s = 0.0
    caught = 0
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as engines:
        assert engines.stdin is not None
        assert engines.stdout is not None

        def fork() -> int:
            print("one", file=engines.stdin, flush=True)
            # The life before may have come up just before it was killed.
            while (line := engines.stdout.readline()) == "up\n":
                pass
            return int(line)

        def wait_until_up() -> float:
            began = time.monotonic()
            assert engines.stdout.readline() == "up\n"
            return time.monotonic() - began

        start_s = 0.0
        for life in range(COUNT):
            pid = fork()
            # Every fourth lives until its group is up, however fast the machine is just now.
            if up := life % 4 == 0:
                start_s = wait_until_up()
            time.sleep(random.uniform(0, UP_S if up else start_s))
            ranks = list(ranks_of(home))
            assert ranks or not up
            caught += len(ranks)
            began = time.monotonic()
            os.kill(pid, SIGKILL)
            assert_ended(ranks, within_s=stalled_s(ROW.bound_s))
            assert_nothing_left(home, within_s=stalled_s(ROW.bound_s))
            slowest_s = max(slowest_s, time.monotonic() - began)
        engines.stdin.close()
    print(f"{caught} ranks were alive when the process was killed; a start took {start_s:.1f} s")
    observe(ROW, slowest_s)
