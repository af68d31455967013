"""Evaluations that were sent: their results, and what has become of them.

On GPUs, results of short evaluations are handed over *in stream order*, to whoever asks for them
``ahead``: as tensors that are not computed yet, in a stream that waits for the ranks. So the Python
of a sampler prepares the next step while the ranks compute this one. What went wrong is raised at
the next evaluation, or when ``ahead`` ends, before anybody has the sampler's result.

A thread that reads such a tensor waits without Python's lock, which torch gives back meanwhile: so
the owner of a group whose rank has died can let the stream go on.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import torch

from .call import Call
from .poll import Poll

_under_way: contextvars.ContextVar["list[Evaluated] | None"] = contextvars.ContextVar(
    "evaluations that were asked for ahead", default=None
)


class Evaluated:
    """The evaluations of one request.

    ``results``: of each evaluation, a tensor for each of its latents. ``settle`` says whether they
    are right; until then they are good for nothing but work in their device's stream.
    """

    def __init__(
        self,
        results: list[list[torch.Tensor]],
        call: Call,
        check: Callable[[], None],
        give_up: Callable[[], None],
    ) -> None:
        """``check``: raises what is wrong with a finished call; ``give_up``: has no stream wait."""
        self.results = results
        self._call, self._check, self._give_up = call, check, give_up
        self._then: list[Callable[[], None]] = []
        self.settled = False

    @property
    def seconds(self) -> float:
        """What the ranks took, from the request to the last one's answer."""
        return self._call.ended - self._call.began

    def settle(self, poll: Poll | None = None) -> None:
        """Return when the ranks have answered, and the results are known to be right. Idempotent.

        Raises:
            As ``Engine.evaluate``; and what ``poll`` raises.
        """
        if self.settled:
            return
        try:
            self._call.wait(poll)
            self._check()
        except BaseException:
            self.give_up()
            raise
        self.settled = True
        for function in self._then:
            function()
        self._then.clear()

    def give_up(self) -> None:
        """Nobody is going to look at the results: whatever waits for them may go on."""
        self._give_up()

    def when_settled(self, function: Callable[[], None]) -> None:
        """Call it once the results are known to be right."""
        if self.settled:
            function()
        else:
            self._then.append(function)


def may_be_ahead() -> bool:
    """Whether this thread takes results that are not computed yet."""
    return _under_way.get() is not None


def is_ahead(evaluated: Evaluated) -> None:
    """Note an evaluation of this thread as one that ``ahead`` has to settle."""
    under_way = _under_way.get()
    assert under_way is not None, "nobody would settle it"
    under_way.append(evaluated)


def settle_all(poll: Poll | None = None) -> None:
    """Settle what this thread has asked for ahead: the next request may use its places."""
    under_way = _under_way.get() or []
    while under_way:
        under_way.pop(0).settle(poll)


@contextlib.contextmanager
def ahead(poll: Poll | None = None) -> Iterator[None]:
    """Within, evaluations may return before they are computed; at the end all of them are.

    Raises:
        What ``Evaluated.settle`` raises of the last evaluations.
    """
    if may_be_ahead():
        yield
        return
    under_way: list[Evaluated] = []
    token = _under_way.set(under_way)
    try:
        yield
        settle_all(poll)
    finally:
        for evaluated in under_way:  # an error, or a cancel
            evaluated.give_up()
        _under_way.reset(token)
