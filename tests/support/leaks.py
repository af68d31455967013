"""Checks that nothing outlives the pack: no process of its own, no entry in /dev/shm.

Ranks and the servers that they are forked from are recognised by their command line, wherever they
were started from. Those of another test run on this machine, whose engine is alive, are its own.
A fork server whose engine is alive is no leak: it waits for the next group, and ends with it.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

WORKER_MARK = "tp_runtime.rank.worker"
SERVER_MARK = "tp_runtime.rank.fork_server"
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Footprint:
    """What the machine holds of us at one moment."""

    worker_pids: frozenset[int]
    shared_memory: frozenset[str]

    @classmethod
    def now(cls) -> "Footprint":
        """Look at the processes and the shared memory of the machine."""
        pids = frozenset(process.pid for process in (*worker_processes(), *fork_servers()))
        return cls(pids, frozenset(entry.name for entry in SHARED_MEMORY.iterdir()))

    def added_since(self, before: "Footprint") -> "Footprint":
        """What is here and was not in `before`."""
        return Footprint(
            self.worker_pids - before.worker_pids, self.shared_memory - before.shared_memory
        )

    def is_empty(self) -> bool:
        return not self.worker_pids and not self.shared_memory


def worker_processes() -> list[psutil.Process]:
    """Every live rank process on the machine, except those that another run looks after."""
    return _marked(WORKER_MARK)


def fork_servers() -> list[psutil.Process]:
    """Every live fork server whose engine has ended, except those of another run."""
    ancestors = _our_ancestors()
    servers = []
    for server in _marked(SERVER_MARK):
        with contextlib.suppress(psutil.NoSuchProcess):
            if server.ppid() in ancestors:
                servers.append(server)
    return servers


def is_marked(process: psutil.Process, mark: str) -> bool:
    """Whether a process is alive and has `mark` in its command line."""
    with contextlib.suppress(psutil.NoSuchProcess):
        is_live = process.status() != psutil.STATUS_ZOMBIE
        return is_live and mark in " ".join(process.cmdline())
    return False


def _marked(mark: str) -> list[psutil.Process]:
    ancestors = _our_ancestors()
    return [
        process
        for process in psutil.process_iter()
        if is_marked(process, mark) and not of_another_run(process, ancestors)
    ]


def _our_ancestors() -> set[int]:
    """What collects orphans is one of them."""
    return {parent.pid for parent in psutil.Process().parents()}


def of_another_run(process: psutil.Process, our_ancestors: set[int]) -> bool:
    """Whether a live process that has nothing to do with this one started it.

    An orphan hangs from init or from what collects the orphans here: an ancestor of ours.
    """
    try:
        parents = {parent.pid for parent in process.parents()}
    except psutil.NoSuchProcess:
        return False
    return os.getpid() not in parents and not parents <= our_ancestors


def assert_nothing_added(before: Footprint, within_s: float = 5.0) -> None:
    """Wait up to `within_s` for everything that came after `before` to go away.

    Raises:
        AssertionError: something is left; it names the processes and the entries.
    """
    deadline = time.monotonic() + within_s
    while not (added := Footprint.now().added_since(before)).is_empty():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"left over after {within_s} s: processes {sorted(added.worker_pids)}, "
                f"/dev/shm entries {sorted(added.shared_memory)}"
            )
        time.sleep(0.05)


@contextmanager
def nothing_left_over(within_s: float = 5.0) -> Iterator[None]:
    """Whatever the body starts is gone `within_s` after it (also when the body raises)."""
    before = Footprint.now()
    try:
        yield
    finally:
        assert_nothing_added(before, within_s)
