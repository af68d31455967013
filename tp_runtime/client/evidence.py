"""What speaks against the ranks of a group, and which of them is the cause of its failure."""

from collections.abc import Sequence

from ..config import GroupConfig
from ..errors import TPRuntimeError
from ..wire.protocol import Failed
from . import failures
from .launch.launcher import Rank


class Evidence:
    """Notes what ranks have raised or sent, and finds from it what the group has failed of.

    Where a rank ends, the other ranks' collectives fail a moment later, and they say so. So a rank
    that has ended without a word is the cause; if there is none, the rank that raised first.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.blamed: Rank | None = None
        self.last_words: dict[int, Failed] = {}  # of each rank that has raised, by its index
        self.fault: TPRuntimeError | None = None  # what is wrong with what a rank has sent
        self._config = config

    def __bool__(self) -> bool:
        """Whether a rank has raised, or sent what it should not have."""
        return self.fault is not None or bool(self.last_words)

    def note_fault(self, rank: Rank, fault: TPRuntimeError) -> None:
        """What the rank has sent is wrong, or was lost on its way to whom it concerns."""
        self.blamed, self.fault = rank, fault

    def silence(self, silent: Sequence[Rank], timeout_s: float, doing: str) -> TPRuntimeError:
        """The error for ranks that have given no sign of life for so long."""
        self.blamed = silent[0]
        return failures.silence(silent, timeout_s, doing)

    def verdict(
        self, ranks: Sequence[Rank], gone: Sequence[Rank], doing: str | None
    ) -> TPRuntimeError | None:
        """What the group has failed of; None: nothing yet.

        ``gone``: those of ``ranks`` that have ended without a word. ``doing``: the request that is
        under way.
        """
        if self.fault is not None:
            return self.fault
        if gone:
            self.blamed = gone[0]
            return failures.death(gone[0], doing)
        if not self.last_words:
            return None
        first = min(
            (rank for rank in ranks if rank.index in self.last_words),
            key=lambda rank: self.last_words[rank.index].time_s - rank.clock_ahead_s,
        )
        self.blamed = first
        return failures.rank_error(self._config, first, self.last_words[first.index], doing)

    def log_tail(self) -> str:
        """The end of the log of the rank that is blamed; empty while none is."""
        return self.blamed.log_tail() if self.blamed else ""
