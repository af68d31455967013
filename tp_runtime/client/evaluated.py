"""Evaluations that were sent: their results, and what has become of them.

On GPUs, results are handed over *in stream order*, to whoever asks for them ``ahead``: as tensors
that are not computed yet, in a stream that waits for the ranks. So the Python of a sampler prepares
the next step while the ranks compute this one; and where nothing has to be looked at before the
ranks can be asked for it, they have its request before its latent is there. What went wrong is
raised at the evaluation after the next at the latest, or when ``ahead`` ends, before anybody has
the sampler's result.

A thread that reads such a tensor waits without Python's lock, which torch gives back meanwhile: so
the owner of a group whose rank has died can let the stream go on. A cancel does it, too, seen by a
thread of its own: whoever waits for the GPU cannot be asked whether it still wants to.
"""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from . import failures
from .call import Call
from .poll import Poll

# What has let a stream go on is known a moment later. A cancel, which is over within a tenth of a
# second, may be what waits for that.
_KNOWN_S = 0.05
_LOOK_S = 0.02  # for a cancel, while something is under way

_scope: contextvars.ContextVar["_Scope | None"] = contextvars.ContextVar("ahead", default=None)


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
        """What the ranks took, from when they could begin to the last one's answer."""
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
            if poll is not None:  # a cancel has let the stream go on, perhaps before the answer
                poll()
            self._check()
        except BaseException:
            self.give_up()
            raise
        self.settled = True
        for function in self._then:
            function()
        self._then.clear()

    def has_ended(self, within_s: float) -> bool:
        """Whether the ranks have answered, or will not any more, by then."""
        return self._call.finished.wait(within_s)

    def give_up(self) -> None:
        """Nobody is going to look at the results: whatever waits for them may go on."""
        self._give_up()

    def when_settled(self, function: Callable[[], None]) -> None:
        """Call it once the results are known to be right."""
        if self.settled:
            function()
        else:
            self._then.append(function)


class _Scope:
    """What a thread has asked for ahead, and what it is going to do meanwhile.

    ``let_go``: a cancel has let its stream go on, and what that has computed since is not right.
    """

    def __init__(self, is_cancelled: Callable[[], bool] | None) -> None:
        self.under_way: list[Evaluated] = []
        self.later: list[Callable[[], object]] = []
        self.remembered: dict[Hashable, Any] = {}
        self.let_go = False
        self._is_cancelled = is_cancelled
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()

    def add(self, evaluated: Evaluated) -> None:
        self.under_way.append(evaluated)
        if self._watcher is None and self._is_cancelled is not None:
            self._watcher = threading.Thread(
                target=self._watch, args=(self._is_cancelled,), name="tp-cancel", daemon=True
            )
            self._watcher.start()

    def _watch(self, is_cancelled: Callable[[], bool]) -> None:
        while not self._over.wait(_LOOK_S):
            if is_cancelled():
                self.let_go = True
                self.give_up()

    def give_up(self) -> None:
        for evaluated in list(self.under_way):
            evaluated.give_up()

    def close(self) -> None:
        self.give_up()  # what is under way still, after an error or a cancel
        self._over.set()
        if self._watcher is not None:
            self._watcher.join()


def may_be_ahead() -> bool:
    """Whether this thread takes results that are not computed yet."""
    return _scope.get() is not None


def note_ahead(evaluated: Evaluated) -> None:
    """Note an evaluation of this thread as one that ``ahead`` has to settle."""
    scope = _scope.get()
    assert scope is not None, "nobody would settle it"
    scope.add(evaluated)


def settle_all(poll: Poll | None = None, *, but: int = 0) -> None:
    """Settle what this thread has asked for ahead, but for so many of the last."""
    scope = _scope.get()
    while scope is not None and len(scope.under_way) > but:
        scope.under_way.pop(0).settle(poll)


def remembered() -> dict[Hashable, Any]:
    """What is of use until ``ahead`` ends; outside of it, an empty dictionary that nobody keeps."""
    scope = _scope.get()
    return {} if scope is None else scope.remembered


def meanwhile(function: Callable[[], object], *tensors: torch.Tensor) -> None:
    """Call it while the ranks compute the next evaluation; at once, if they are not computing one.

    A function that reads tensors of the evaluation under way would wait for it, and its thread
    could not ask for the next. ``tensors``: those of a GPU that it reads. It is called once they
    are computed, with another stream, in which they are what they are now.

    The host waits for them, not that stream: while a second stream of this process waits, with
    work behind its wait, on a GPU that a rank shares, the rank's evaluation takes 1.4 times as long
    (FLUX.1, one H200: 173 ms instead of 125; `bench/RESULTS.md`, 2026-12-01).
    """
    scope = _scope.get()
    if scope is None or not scope.under_way:
        function()
        return
    computed = {
        t.device: torch.cuda.current_stream(t.device).record_event(torch.cuda.Event(blocking=True))
        for t in tensors
    }

    def call() -> None:
        with contextlib.ExitStack() as streams:
            for device, event in computed.items():
                event.synchronize()
                stream = _other_stream(device)
                streams.enter_context(torch.cuda.stream(stream))
                for tensor in tensors:
                    if tensor.device == device:  # its memory is not used again before
                        tensor.record_stream(stream)
            function()

    scope.later.append(call)


@functools.cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: each new one would have cuBLAS workspaces and cached memory of its own."""
    return torch.cuda.Stream(device)


def do_meanwhile() -> None:
    """Do what was left for the time in which the ranks compute: now they do, or have nothing to."""
    scope = _scope.get()
    while scope is not None and scope.later:
        scope.later.pop(0)()


@contextlib.contextmanager
def ahead(
    poll: Poll | None = None, is_cancelled: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Within, evaluations may return before they are computed; at the end all of them are.

    An error in the body may come of a value that is not right: if the ranks have failed, that is
    raised instead. ``is_cancelled``: whether ``poll`` would raise; called by another thread. Then
    no stream waits for the ranks any more.

    Raises:
        What ``Evaluated.settle`` raises of the last evaluations.
    """
    if may_be_ahead():
        yield
        return
    scope = _Scope(is_cancelled)
    token = _scope.set(scope)
    try:
        yield
        settle_all(poll)
        do_meanwhile()
        if scope.let_go:
            raise failures.let_go()
    except Exception:
        if scope.let_go and poll is not None:  # raises the cancel, which whatever it is comes of
            poll()
        while scope.under_way and scope.under_way[0].has_ended(_KNOWN_S):
            scope.under_way.pop(0).settle(poll)
        raise
    finally:
        scope.close()
        _scope.reset(token)
