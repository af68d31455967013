"""What starts and ends the ranks of a group, as the engine sees it.

``Launcher`` is the seam: the engine knows ranks only as ``Rank`` objects (a channel to talk to,
a process to watch and to end). ``LocalLauncher`` runs them on this machine, ``RayLauncher`` on a
Ray cluster.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from ... import machine, reasons
from ...config import GroupConfig
from ...errors import GroupStartError
from ...wire.exchange import Exchange
from ...wire.transport import Channel
from ..poll import Poll

logger = logging.getLogger("tp_runtime")

KILL_TIMEOUT_S = 10.0
LOG_TAIL_BYTES = 4000


class Rank(Protocol):
    """One running rank.

    ``death_fd``: readable as soon as the process has ended; -1 after ``release``. ``mirrored``: its
    exchange memory is not the engine's. ``clock_ahead_s``: by how much its monotonic clock is ahead
    of this machine's.
    """

    index: int
    pid: int
    channel: Channel
    death_fd: int
    log_path: Path
    mirrored: bool
    clock_ahead_s: float

    @property
    def place(self) -> str:
        """Which process it is, for a message to a person."""
        ...

    def ended(self, timeout_s: float) -> bool:
        """Whether the process has ended, at the latest after ``timeout_s``."""
        ...

    def describe_exit(self) -> str:
        """How the process ended, for a message to a person."""
        ...

    def log_tail(self) -> str:
        """The end of the rank's log."""
        ...

    def kill(self) -> None:
        """End the process at once, if it has not ended."""
        ...

    def release(self) -> None:
        """Close what this process holds of the rank. Idempotent."""
        ...


class Launcher(Protocol):
    """Starts the ranks of one group, once, and cleans up after them."""

    def prepare(self, config: GroupConfig, poll: Poll) -> None:
        """Have all there that ``launch`` needs; what takes long is done here.

        ``poll`` is called every 10 ms or so while waiting; what it raises ends the wait.

        Raises:
            GroupStartError: it cannot be had, or not within the time that a start may take.
        """
        ...

    def launch(self, config: GroupConfig, exchange: Exchange, poll: Poll) -> Sequence[Rank]:
        """Start all ranks; none may be left if one does not start.

        They end with this process, at the latest. ``poll`` is called while waiting, as by
        ``prepare``, or between ranks.

        Raises:
            GroupStartError: one does not start.
        """
        ...

    def clean_up(self, keep_logs: bool) -> None:
        """Remove what the ranks left on disk, after all of them have ended. Idempotent."""
        ...


def check_system_calls() -> None:
    """Raises GroupStartError if a sandbox refuses what a group needs."""
    if refused := machine.refused_system_call():
        raise GroupStartError(
            f"A process group needs the system call {refused}. {reasons.advice(refused)}"
        )


def tail_of(log: BinaryIO) -> str:
    """The end of a log, for a message to a person."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
    return log.read(LOG_TAIL_BYTES).decode(errors="replace").strip() or "(It is empty.)"


def tail_of_file(path: Path) -> str:
    """The end of a log, or why it cannot be read."""
    try:
        with open(path, "rb") as log:
            return tail_of(log)
    except OSError as error:
        return f"(The log cannot be read: {error}.)"


def end_ranks(ranks: Sequence[Rank], grace_s: float) -> None:
    """Wait ``grace_s`` for the processes to end by themselves, then kill them all. Idempotent."""
    ranks = [rank for rank in ranks if rank.death_fd >= 0]
    deadline = time.monotonic() + grace_s
    for rank in ranks:
        rank.ended(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()
    deadline = time.monotonic() + KILL_TIMEOUT_S
    for rank in ranks:
        if not rank.ended(max(0.0, deadline - time.monotonic())):
            logger.error(
                "rank %d (%s) was killed but has not ended after %g s: a driver holds it",
                rank.index,
                rank.place,
                KILL_TIMEOUT_S,
            )
        rank.release()
