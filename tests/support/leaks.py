"""Checks that nothing outlives the pack: no process, no entry in /dev/shm, no socket or file in the
temporary folder.

Ranks and the servers that they are forked from are recognised by their command line, wherever they
were started from. Those of another test run on this machine are its own, and so is what its
processes have open in /dev/shm; each worker of pytest-xdist is such a run, and has a temporary
folder of its own (`TMPDIR`), which what it starts inherits.
A fork server whose engine is alive is no leak: it waits for the next group, and ends with it.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.workers import bound_s

WORKER_MARK = "tp_runtime.rank.worker"
SERVER_MARK = "tp_runtime.rank.fork_server"
SHARED_MEMORY = Path("/dev/shm")
# What a test run starts inherits this, the folder of the run's temporary files; orphans are told
# apart by it. A rank shows no environment: it has the folder of its group in its command line.
RUN = "TP_RUNTIME_TESTS"


@dataclass(frozen=True)
class Footprint:
    """What the machine holds of us at one moment."""

    worker_pids: frozenset[int]
    shared_memory: frozenset[str]
    temporary: frozenset[str]

    @classmethod
    def now(cls) -> "Footprint":
        """Look at the processes, the shared memory and the temporary folder."""
        pids = frozenset(process.pid for process in (*worker_processes(), *fork_servers()))
        entries = frozenset(entry.name for entry in SHARED_MEMORY.iterdir())
        return cls(pids, entries, _temporary())

    def added_since(self, before: "Footprint") -> "Footprint":
        """What is here, was not in `before`, and is not another run's."""
        return Footprint(
            self.worker_pids - before.worker_pids,
            without_those_of_others(self.shared_memory - before.shared_memory),
            self.temporary - before.temporary,
        )

    def is_empty(self) -> bool:
        return not (self.worker_pids or self.shared_memory or self.temporary)


def _temporary() -> frozenset[str]:
    """The sockets and files of the temporary folder.

    Its folders are those of tests, and what torch compiles.
    """
    folder = Path(tempfile.gettempdir())
    return frozenset(entry.name for entry in folder.iterdir() if not entry.is_dir())


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
        if is_marked(process, mark)
        if not of_another_run(process, ancestors)
        if process.is_running()  # it may have ended before its parents were looked at
    ]


def _our_ancestors() -> set[int]:
    """What collects orphans is one of them."""
    return {parent.pid for parent in psutil.Process().parents()}


def of_another_run(process: psutil.Process, our_ancestors: set[int]) -> bool:
    """Whether a process that has nothing to do with this one started it.

    An orphan hangs from init or from what collects the orphans here: an ancestor of ours. It is
    another run's if it says so.
    """
    try:
        parents = {parent.pid for parent in process.parents()}
        if os.getpid() in parents:
            return False
        return not parents <= our_ancestors or _says_another_run(process)
    except psutil.Error:
        return False


def _says_another_run(orphan: psutil.Process) -> bool:
    ours = os.environ.get(RUN)
    if ours is None:
        return False
    if (theirs := orphan.environ().get(RUN)) is not None:
        return theirs != ours
    command_line = " ".join(orphan.cmdline())
    return command_line.startswith(WORKER_MARK) and f"{ours}/" not in command_line


def without_those_of_others(entries: frozenset[str]) -> frozenset[str]:
    """Those of the entries of /dev/shm that no process of another run has open, and that stay.

    What another run makes for a moment may be listed, and gone before its process is looked at.
    """
    if not entries:  # as nearly always: what follows looks at every process
        return entries
    ancestors = _our_ancestors()
    others: set[str] = set()
    for process in psutil.process_iter():
        if not others.issuperset(held := _entries_of(process)) and of_another_run(
            process, ancestors
        ):
            others |= held
    return frozenset(entry for entry in entries - others if (SHARED_MEMORY / entry).exists())


def _entries_of(process: psutil.Process) -> set[str]:
    """The names in /dev/shm of what a process has open or mapped."""
    folder = Path(f"/proc/{process.pid}")
    paths: list[str] = []
    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        paths += [line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()]
        for link in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):
                paths.append(str(link.readlink()))
    prefix = f"{SHARED_MEMORY}/"
    return {path.removeprefix(prefix) for path in paths if path.startswith(prefix)}


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """What this process and its children write into the temporary folder is theirs alone."""
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="tp-") as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = None  # it is asked for again
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before


def assert_nothing_added(before: Footprint, within_s: float = bound_s(5)) -> None:
    """Wait up to `within_s` for everything that came after `before` to go away.

    Raises:
        AssertionError: something is left; it names the processes and the entries.
    """
    deadline = time.monotonic() + within_s
    while True:
        is_late = time.monotonic() > deadline  # before the look, which may take its time
        added = Footprint.now().added_since(before)
        if added.is_empty():
            return
        if is_late:
            raise AssertionError(
                f"left over after {within_s} s: processes {sorted(added.worker_pids)}, "
                f"/dev/shm entries {sorted(added.shared_memory)}, "
                f"temporary files {sorted(added.temporary)}"
            )
        time.sleep(0.05)


@contextmanager
def nothing_left_over(within_s: float = bound_s(5)) -> Iterator[None]:
    """Whatever the body starts is gone `within_s` after it (also when the body raises)."""
    before = Footprint.now()
    try:
        yield
    finally:
        assert_nothing_added(before, within_s)
