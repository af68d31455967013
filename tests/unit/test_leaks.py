"""The leak check itself: it sees what it is there to see."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.leaks import (
    SERVER_MARK,
    WORKER_MARK,
    Footprint,
    assert_nothing_added,
    nothing_left_over,
)

READ = "import sys; sys.stdin.read()"


def test_a_rank_that_lives_on_is_reported() -> None:
    before = Footprint.now()
    command = [sys.executable, "-c", READ, WORKER_MARK]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        with pytest.raises(AssertionError, match=str(process.pid)):
            assert_nothing_added(before, within_s=0.2)
    assert_nothing_added(before)


def test_a_fork_server_whose_engine_is_gone_is_reported() -> None:
    before = Footprint.now()
    # A process that leaves another one behind, which is adopted by none of ours.
    leave = (
        "import subprocess, sys; "
        "print(subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], stdout=2).pid)"
    )
    command = [sys.executable, "-c", leave, READ, SERVER_MARK]
    done = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid, _ = done.stdout.readline(), done.wait()
    with pytest.raises(AssertionError, match=pid.strip()):
        assert_nothing_added(before, within_s=0.2)
    done.stdin.close()
    assert_nothing_added(before)


def test_shared_memory_that_stays_is_reported() -> None:
    entry = Path("/dev/shm/tp-leak-check-test")
    with pytest.raises(AssertionError, match=entry.name):
        with nothing_left_over(within_s=0.2):
            entry.touch()
    entry.unlink()
