"""One request under way: who has answered it, until when, what it ends in."""

import threading
import time
from collections.abc import Callable

from ..errors import REFUSALS, GroupDiedError, ProtocolError, TPRuntimeError
from ..wire.protocol import Done, Failed, Progress, Ready
from . import failures
from .poll import POLL_S, Poll

START = 0  # number of the call that the ranks' ready messages answer

OnProgress = Callable[[int, int], None]


class Call:
    """What each rank has answered so far. ``Hearing`` fills it in, and its caller waits for it."""

    def __init__(self, number: int, num_ranks: int, timeout_s: float, what: str) -> None:
        self.number = number
        self.what = what
        self.timeout_s = timeout_s
        self.begin()
        self.ended = self.began
        self.sent = True  # to every rank: none was gone already
        self.answers: dict[int, Ready | Done | Failed] = {}
        self.error: TPRuntimeError | None = None
        self.finished = threading.Event()
        self._num_ranks = num_ranks
        self._progress: dict[int, tuple[int, int]] = {}

    # --- for the thread that hears the ranks ---------------------------------------------------

    def take(self, rank: int, reply: Ready | Done | Failed | Progress) -> None:
        """Note what a rank says. A sign of life counts from now on.

        Raises:
            ProtocolError: it fits no request, or not the other ranks' answers.
        """
        number = START if isinstance(reply, Ready) else reply.call
        if (
            number != self.number
            or rank in self.answers
            or isinstance(reply, Ready) != (number == START)
        ):
            raise unasked(rank)
        if isinstance(reply, Progress):
            self._progress[rank] = (reply.done, reply.total)
            self.deadline = time.monotonic() + self.timeout_s
            return
        self.answers[rank] = reply
        refused = [answer for answer in self.answers.values() if isinstance(answer, Failed)]
        if self.complete() and len(refused) not in (0, len(self.answers)):
            raise ProtocolError(
                f"Some ranks refused a request that others carried out: {refused[0].message}"
            )

    def complete(self) -> bool:
        """Whether every rank has answered."""
        return len(self.answers) == self._num_ranks

    def begin(self) -> None:
        """The ranks begin it now: its time counts from here."""
        self.began = time.monotonic()
        self.deadline = self.began + self.timeout_s

    def finish(self, error: TPRuntimeError | None = None) -> None:
        """Let the caller go on; ``error`` has ended the group meanwhile."""
        self.error = error
        self.ended = time.monotonic()
        self.finished.set()

    # --- for the caller ------------------------------------------------------------------------

    def wait(
        self,
        poll: Poll | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Return when the call has finished. What ``poll`` raises ends the wait."""
        shown = (0, 0)

        def show_progress() -> None:
            nonlocal shown
            if on_progress is not None and self._progress:
                parts = list(self._progress.values())
                now = (sum(done for done, _ in parts), sum(total for _, total in parts))
                if now != shown:
                    on_progress(*now)
                    shown = now

        while not self.finished.wait(POLL_S):
            if poll is not None:
                poll()
            show_progress()
        show_progress()  # a fast request ends before the first look at it

    def raise_error(self) -> None:
        """Raise what has ended the group, or the ranks have refused the request with, if any.

        A new object: an error holds the frames that it went through, and the group's is kept.
        """
        if isinstance(self.error, GroupDiedError) and not self.sent:
            raise failures.lost(self.error)
        if self.error is not None:
            raise type(self.error)(str(self.error))
        for answer in self.answers.values():
            if isinstance(answer, Failed):
                raise REFUSALS[answer.kind](answer.message)


def unasked(rank: int) -> ProtocolError:
    """For what a rank has sent while nothing was asked of it, or something else."""
    return ProtocolError(f"Rank {rank} sent an answer that nothing had asked for.")
