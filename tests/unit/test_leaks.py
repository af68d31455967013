"""The leak check itself: it sees what it is there to see."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support import leaks
from support.leaks import (
    RUN,
    SERVER_MARK,
    WORKER_MARK,
    Footprint,
    assert_nothing_added,
    is_marked,
    nothing_left_over,
    of_another_run,
    without_those_of_others,
)
from support.waiting import wait_until

READ = "import sys; sys.stdin.read()"
# A process that leaves another one behind, which is adopted by none of ours.
LEAVE = (
    "import subprocess, sys; "
    "print(subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], stdout=2).pid)"
)


@contextmanager
def orphaned_server(code: str = READ, **environment: str) -> Iterator[str]:
    """A fork server without an engine, by its command line; its process id."""
    with subprocess.Popen(
        [sys.executable, "-c", LEAVE, code, SERVER_MARK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as parent:
        assert parent.stdout is not None
        pid = parent.stdout.readline().strip()
        parent.wait()
        wait_until(lambda: lives(pid, SERVER_MARK))
        yield pid


def lives(pid: int | str, mark: str) -> bool:
    """Whether it does, with the command line that it was started for: it has that a bit later."""
    return any(str(one.pid) == str(pid) and is_marked(one, mark) for one in psutil.process_iter())


def test_a_rank_that_lives_on_is_reported() -> None:
    before = Footprint.now()
    command = [sys.executable, "-c", READ, WORKER_MARK]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: lives(process.pid, WORKER_MARK))
        with pytest.raises(AssertionError, match=str(process.pid)):
            assert_nothing_added(before, within_s=0.2)
    assert_nothing_added(before)


def test_a_fork_server_whose_engine_is_gone_is_reported() -> None:
    before = Footprint.now()
    with orphaned_server() as pid, pytest.raises(AssertionError, match=pid):
        assert_nothing_added(before, within_s=0.2)
    assert_nothing_added(before)


def test_what_another_worker_leaves_for_a_moment_is_its_own(tmp_path: Path) -> None:
    """Such as the ranks of an engine that its test has killed, or what its Ray has in /dev/shm."""
    entry = Path(f"/dev/shm/tp-leak-check-{tmp_path.name}")
    hold = f"file = open({str(entry)!r}, 'w'); {READ}"
    before = Footprint.now()
    try:
        with orphaned_server(hold, **{RUN: "/tmp/of-another-worker"}) as pid:
            while not entry.exists():
                time.sleep(0.01)
            assert_nothing_added(before, within_s=0.2)
            assert psutil.pid_exists(int(pid))
        wait_until(lambda: not lives(pid, SERVER_MARK))
        with pytest.raises(AssertionError, match=entry.name):
            assert_nothing_added(before, within_s=0.2)
    finally:
        entry.unlink(missing_ok=True)


def test_what_is_gone_when_its_process_is_looked_for_is_no_leak() -> None:
    """Another worker's shared memory may live for less time than the look at all processes."""
    assert without_those_of_others(frozenset({"tp-leak-check-gone"})) == frozenset()


def test_a_process_that_ends_while_it_is_looked_at_is_no_leak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whose it was cannot be seen any more."""
    command = [sys.executable, "-c", READ, WORKER_MARK]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        wait_until(lambda: lives(process.pid, WORKER_MARK))

        def ends(looked_at: psutil.Process, ancestors: set[int]) -> bool:
            if looked_at.pid == process.pid:
                process.kill()
                process.wait()
            return of_another_run(looked_at, ancestors)

        monkeypatch.setattr(leaks, "of_another_run", ends)
        assert process.pid not in Footprint.now().worker_pids
        assert process.returncode is not None


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("leave", [bind, Path.touch])
def test_what_stays_in_the_temporary_folder_is_reported(leave: Callable[[Path], None]) -> None:
    """Such as the sockets that vLLM's message queue leaves at a start."""
    entry = Path(tempfile.gettempdir()) / "left"
    before = Footprint.now()
    leave(entry)
    with pytest.raises(AssertionError, match=r"temporary files \['left'\]"):
        assert_nothing_added(before, within_s=0.2)
    entry.unlink()


def test_shared_memory_that_stays_is_reported() -> None:
    entry = Path("/dev/shm/tp-leak-check-test")
    with pytest.raises(AssertionError, match=entry.name):
        with nothing_left_over(within_s=0.2):
            entry.touch()
    entry.unlink()
