"""`kill -9` of the engine's process at fifty random moments: its ranks are gone soon each time.

The process does with tp_runtime what ComfyUI's does, on ranks that compute nothing, and is forked
from one that has imported everything. `test_comfyui_killed.py` kills a real ComfyUI.
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

pytestmark = pytest.mark.process

COUNT = 50
ROW = case("any", "a process with a group is killed")
# A life is as long as a start takes here and a little more, so that every phase is hit.
AFTER_START_S = 0.4

ENGINES = """
import os, sys
sys.path[:0] = {paths!r}
from process.conftest import cpu_group, make_inputs
from tp_runtime import ModelSpec, Runtime

def live():
    model = Runtime().model(ModelSpec.of({file!r}, "float32", "float32"), config)
    model.ensure_loaded()
    print("up", flush=True)
    while True:
        model.denoise(make_inputs())
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
            while (line := engines.stdout.readline()) == "up\n":
                pass
            return int(line)

        pid, began = fork(), time.monotonic()
        assert engines.stdout.readline() == "up\n"
        life_s = time.monotonic() - began + AFTER_START_S
        for _ in range(COUNT):
            ranks = list(ranks_of(home))
            caught += len(ranks)
            began = time.monotonic()
            os.kill(pid, SIGKILL)
            assert_ended(ranks, within_s=ROW.bound_s)
            assert_nothing_left(home, within_s=ROW.bound_s)
            slowest_s = max(slowest_s, time.monotonic() - began)
            pid = fork()
            time.sleep(random.uniform(0, life_s))
        os.kill(pid, SIGKILL)
        engines.stdin.close()
    print(f"{caught} ranks were alive when the process was killed; a life is {life_s:.1f} s")
    assert caught > COUNT // 4
    observe(ROW, slowest_s)
