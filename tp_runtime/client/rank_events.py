"""The file descriptors that a group's owner waits on."""

import os
import threading
from collections.abc import Sequence

from .. import reasons
from ..errors import TPRuntimeError
from ..wire.transport import Channel, Readiness
from .launch.launcher import Rank


def _eventfd() -> int:
    try:
        return os.eventfd(0, os.EFD_CLOEXEC)
    except OSError as error:
        raise TPRuntimeError(f"A process group cannot be watched: {reasons.of(error)}") from error


class RankEvents:
    """Tells that a rank has sent something, that one has ended, or that somebody calls the owner.

    Thread-safe. A new object has only the call; ``watch`` adds the ranks. After ``close`` nothing
    happens any more.
    """

    def __init__(self) -> None:
        """Raises TPRuntimeError: no more files may be opened."""
        self._call_fd = _eventfd()  # readable when the owner is called; or -1
        self._lock = threading.Lock()  # guards _call_fd; nothing else is taken while it is held
        self._ends: Readiness | None = None  # the ends of the ranks' processes
        self._all: Readiness | None = None  # these ends, the ranks' channels and the owner's call

    def watch(self, ranks: Sequence[Rank]) -> None:
        """From now on, these are the ranks. Raises TPRuntimeError: no more files may be opened."""
        ends = [rank.death_fd for rank in ranks]
        self._ends = Readiness(ends)
        self._all = Readiness([self._call_fd, *(rank.channel for rank in ranks), *ends])

    def wait(self, timeout_s: float) -> list[Channel | int]:
        """What has happened, after a while: channels with frames, ``death_fd`` of ended ranks."""
        assert self._all is not None, "there are no ranks yet"
        ready = self._all.wait(timeout_s)
        if self._call_fd in ready:
            os.eventfd_read(self._call_fd)
        return ready

    def call_owner(self) -> None:
        """Have the owner's ``wait`` return at once."""
        with self._lock:
            if self._call_fd >= 0:
                os.eventfd_write(self._call_fd, 1)

    def has_end(self) -> bool:
        """Whether the process of a rank has ended."""
        return self._ends is not None and bool(self._ends.wait(0))

    def close(self) -> None:
        """Give the file descriptors back. Idempotent."""
        with self._lock:
            if self._call_fd >= 0:
                os.close(self._call_fd)
                self._call_fd = -1
        for readiness in (self._ends, self._all):
            if readiness is not None:
                readiness.close()
