"""The engine's process is killed: its ranks are gone within seconds, wherever they were."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from process.conftest import TESTS, PythonWith, assert_ended, assert_nothing_left

from support.paths import REPOSITORY

pytestmark = [pytest.mark.process, pytest.mark.rotates(3)]

BOUND_S = 5.0

PARENT = """
import os, sys, threading, time
sys.path[:0] = {paths!r}
from process.conftest import cpu_group, make_inputs
from tp_runtime.client import ModelSpec, Runtime

model = Runtime().model(ModelSpec.of({file!r}, "float32", "float32"), cpu_group(2{python}))

def tell():
    print(*[rank.pid for rank in model._group.engine.ranks], flush=True)

def tell_when_launched():
    while not (model._group.engine and model._group.engine.ranks):
        time.sleep(0.01)
    tell()

{what}
time.sleep(600)
"""


@contextmanager
def parent(file: Path, what: str, python: str = "") -> Iterator[tuple[int, list[int]]]:
    """A process that is the engine's; yields its number and its ranks'."""
    code = PARENT.format(
        paths=[str(REPOSITORY), str(TESTS)],
        file=str(file),
        python=f", python={python!r}" if python else "",
        what=what,
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.pid, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


def kill_and_check(home: Path, file: Path, what: str, python: str = "") -> None:
    with parent(file, what, python) as (pid, ranks):
        assert len(ranks) == 2
        os.kill(pid, signal.SIGKILL)
        assert_ended(ranks, within_s=BOUND_S)
        assert_nothing_left(home)


def test_while_starting(home: Path, tiny_z_image: Path) -> None:
    start = "threading.Thread(target=tell_when_launched).start(); model.ensure_loaded()"
    kill_and_check(home, tiny_z_image, start)


def test_in_a_long_forward(home: Path, tiny_z_image: Path) -> None:
    kill_and_check(
        home,
        tiny_z_image,
        "model.ensure_loaded()\n"
        "threading.Thread(target=model.evaluate, args=[make_inputs(256)]).start()\n"
        "time.sleep(1)\n"
        "tell()",
    )


def test_while_idle(home: Path, tiny_z_image: Path, python_with: PythonWith) -> None:
    kill_and_check(home, tiny_z_image, "model.ensure_loaded(); tell()", python_with())


def test_while_a_forked_process_holds_the_streams(
    home: Path, tiny_z_image: Path, python_with: PythonWith
) -> None:
    forking = (
        "model.ensure_loaded()\n"
        "if os.fork() == 0:\n"
        "    os.close(1)\n"
        "    time.sleep(10)\n"
        "    os._exit(0)\n"
        "tell()"
    )
    kill_and_check(home, tiny_z_image, forking, python_with())
