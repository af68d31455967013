"""The leak check itself: it sees what it is there to see."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.leaks import WORKER_MARK, Footprint, assert_nothing_added, nothing_left_over


def test_a_rank_that_lives_on_is_reported() -> None:
    before = Footprint.now()
    command = [sys.executable, "-c", "import sys; sys.stdin.read()", WORKER_MARK]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with pytest.raises(AssertionError, match=str(process.pid)):
            assert_nothing_added(before, within_s=0.2)
    assert_nothing_added(before)


def test_shared_memory_that_stays_is_reported() -> None:
    entry = Path("/dev/shm/tp-leak-check-test")
    with pytest.raises(AssertionError, match=entry.name):
        with nothing_left_over(within_s=0.2):
            entry.touch()
    entry.unlink()
