"""Checks that nothing of a Ray that the pack has started outlives it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from support.leaks import of_another_run

# In the command lines of what a Ray node consists of, and of our driver.
MARKS = ("ray::", "/ray/core/src/ray/", "/ray/_private/", "/ray/dashboard/", "/ray/autoscaler/")
DRIVER_MARK = "tp_runtime.ray_driver.driver"


def _now() -> set[str]:
    """Processes and places of Ray on this machine, without those of another run's processes."""
    found = set()
    ancestors = {parent.pid for parent in psutil.Process().parents()}
    for process in psutil.process_iter(["cmdline", "status"]):
        command_line = " ".join(process.info["cmdline"] or ())
        is_ray = any(mark in command_line for mark in (*MARKS, DRIVER_MARK))
        is_live = process.info["status"] != psutil.STATUS_ZOMBIE
        if is_ray and is_live and not of_another_run(process, ancestors):
            found.add(f"process {process.pid}: {command_line[:100]}")
    places = [*Path("/tmp").glob("ray*"), *Path("/tmp").glob("tp-ray-*"), Path.home() / ".ray"]
    return found | {str(place) for place in places if place.exists()}


@contextmanager
def no_ray_left_over(within_s: float = 10.0) -> Iterator[None]:
    """Whatever of Ray the body starts is gone `within_s` after it."""
    before = _now()
    try:
        yield
    finally:
        deadline = time.monotonic() + within_s
        while left := _now() - before:
            assert time.monotonic() < deadline, f"left over after {within_s} s: {sorted(left)}"
            time.sleep(0.1)
