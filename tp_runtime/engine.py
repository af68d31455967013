"""One process group, seen from ComfyUI's process: states, calls, cancelling, ending.

Part of the engine's half. One thread owns the processes: it starts them, is the only one that
listens to them and the only one that decides that a group has failed (on a rank's death, on an
error of a rank, or when a request has taken too long), and ends them. Callers wait on the request
they made and may abandon it at any time; the ranks then finish it for themselves and the next
request waits for that.

::

    STARTING ──► READY ◄──► BUSY
        │          │          │
        └──────────┴──────────┴──► FAILED or CLOSED   (no process of the group is left)
"""

import contextlib
import enum
import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from . import failures
from .config import GroupConfig
from .errors import (
    REFUSALS,
    GroupClosedError,
    GroupDiedError,
    GroupLostError,
    GroupStartError,
    ProtocolError,
    TPRuntimeError,
)
from .launcher import Launcher, Poll, Rank, end_ranks
from .local_launcher import LocalLauncher
from .protocol import (
    Close,
    Done,
    Failed,
    PatchedWeight,
    Progress,
    Ready,
    Reply,
    Request,
    Unload,
    decode_reply,
    encode,
)
from .sending import TensorSender
from .step_times import StepTimes, shapes_of
from .tensors import copied_to
from .transport import wait

logger = logging.getLogger("tp_runtime")

POLL_S = 0.01
CLOSE_TIMEOUT_S = 5.0
WATCH_S = 1.0  # the owner looks at least this often
FROZEN_S = 2.0  # a look that is later by more: the machine, or its container, stood still

OnProgress = Callable[[int, int], None]


class State(enum.Enum):
    """What a group can be. FAILED and CLOSED are final."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    CLOSED = "closed"


_FINAL = (State.FAILED, State.CLOSED)
_START = 0  # number of the call that the ranks' ready messages answer


class _Call:
    """One request under way: what each rank has answered so far."""

    def __init__(
        self, number: int, num_ranks: int, timeout_s: float, what: str, kind: Hashable = None
    ) -> None:
        self.number = number
        self.what = what
        self.kind = kind  # of an evaluation
        self.began = time.monotonic()
        self.deadline = self.began + timeout_s
        self.timeout_s = timeout_s
        self.sent = True
        self.answers: dict[int, Ready | Done | Failed] = {}
        self.num_ranks = num_ranks
        self.progress: dict[int, tuple[int, int]] = {}
        self.error: TPRuntimeError | None = None
        self.finished = threading.Event()

    def complete(self) -> bool:
        return len(self.answers) == self.num_ranks

    def raise_error(self) -> None:
        """Raise what has ended the group, or the ranks have refused the request with, if any.

        A new object: an error holds the frames that it went through, and the group's is kept.
        """
        if isinstance(self.error, GroupDiedError) and not self.sent:
            raise GroupLostError(str(self.error))
        if self.error is not None:
            raise type(self.error)(str(self.error))
        for answer in self.answers.values():
            if isinstance(answer, Failed):
                raise REFUSALS[answer.kind](answer.message)


class Engine:
    """A process group from its start to its end. Thread-safe; serves one request at a time.

    A new object has no processes; ``start`` makes them and ``close`` ends them, once each.
    """

    def __init__(self, config: GroupConfig, launcher: Launcher | None = None) -> None:
        self.config = config
        self.state = State.STARTING
        self.error: TPRuntimeError | None = None
        self.ranks: list[Rank] = []
        self.ready: list[Ready] = []
        self._launcher = launcher or LocalLauncher()
        self._sender = TensorSender()
        self._step_times = StepTimes()
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()  # held by the caller whose request is being prepared
        self._preparing = (
            threading.Lock()
        )  # held while the exchange memory is written, or given back
        self._lock = threading.Lock()  # guards state, error, _call, _close_asked and _wake_fd
        self._call: _Call | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._close_asked = False
        self._lost = False  # the group has failed, and no request was under way
        self._owner: threading.Thread | None = None
        self._blamed: Rank | None = None

    def is_up(self) -> bool:
        """Whether the group has started, and all its ranks live."""
        return self.state in (State.READY, State.BUSY) and not self._has_dead_rank()

    def _has_dead_rank(self) -> bool:
        return any(rank.ended(0) for rank in self.ranks)

    # --- start ---------------------------------------------------------------------------------

    def start(self, poll: Poll | None = None) -> None:
        """Start the ranks and wait until every one is ready.

        Raises:
            GroupStartError: a rank ended, raised or stayed silent, or sees another TP size than
                the one asked for. Nothing is left running. Whatever ``poll`` raises ends the
                group, too.
        """
        call = _Call(_START, self.config.tp_size, self.config.start_timeout_s, "start")
        with self._lock:
            self._check_not_closed()
            assert self._call is None, "a group is started once"
            self._call = call
        self._prepare(poll)
        with self._lock:
            self._check_not_closed()
            call.deadline = time.monotonic() + call.timeout_s
            self._owner = threading.Thread(target=self._own, name="tp-runtime-group", daemon=True)
            self._owner.start()
        try:
            self._wait(call, poll)
        except BaseException:  # poll raised it
            self.close()
            raise
        if isinstance(call.error, GroupStartError | GroupClosedError):
            call.raise_error()
        if call.error is not None:
            raise failures.not_started(self.config, self.ranks, self._blamed, call.error)

    def _prepare(self, poll: Poll | None) -> None:
        """Have what the launcher needs for the ranks, or end the group."""

        def poll_start() -> None:
            self._check_not_closed()
            if poll is not None:
                poll()

        try:
            self._launcher.prepare(self.config, poll_start)
        except GroupStartError as error:
            self._end(State.FAILED, error)
            raise
        except BaseException:  # poll raised it, or the group was closed
            self.close()
            raise

    def _check_not_closed(self) -> None:
        if self._close_asked:
            raise GroupClosedError("The process group was closed before it had started.")

    # --- requests ------------------------------------------------------------------------------

    def call(
        self,
        make: Callable[[int], Request],
        *,
        poll: Poll | None = None,
        on_progress: OnProgress | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Send one request to every rank; return each rank's ``Done.value``, in rank order.

        ``make`` gets the request's number. ``poll`` is called every 10 ms or so while waiting; if
        it raises, the request is abandoned and what it raised goes on to the caller. After
        ``on_sent`` was called, the ranks carry the request out even then.

        Raises:
            InputError: the ranks refused the request; the group is as before.
            RankError, GroupDiedError, CallTimeoutError: the group has been ended.
            GroupLostError: a rank had died before the request could be sent.
            GroupClosedError: it had been ended before.
        """
        with self._turn_taken(poll):
            call = self._send(make)
            if on_sent is not None:
                on_sent()
            self._wait(call, poll, on_progress)
        call.raise_error()
        return [answer.value for _, answer in sorted(call.answers.items())]  # type: ignore[union-attr]

    def denoise(
        self,
        model: str,
        inputs: Mapping[str, Any],
        result_shape: tuple[int, ...],
        poll: Poll | None = None,
    ) -> torch.Tensor:
        """Evaluate the transformer once; returns a tensor of the dtype and on the device of ``x``.

        ``inputs`` are ComfyUI's forward arguments: a tensor ``x`` and plain data with tensors.
        Tensors that the ranks hold from an earlier call are not sent again.

        Raises:
            As ``call`` does, and ProtocolError if ``inputs`` hold something that cannot be sent.
        """
        results: list[torch.Tensor] = []

        def make(number: int) -> Request:
            request, result = self._sender.denoise(number, model, inputs, result_shape)
            # Looked up now, since the group may end between its answer and our reading it.
            results.append(result)
            return request

        with self._turn_taken(poll):
            try:
                call = self._send(make, kind=(model, shapes_of(inputs)))
            except BaseException:
                self._sender.roll_back()
                raise
            self._sender.sent()
            self._wait(call, poll)
            call.raise_error()
            return copied_to(inputs["x"].device, results[0])

    def patch(
        self,
        model: str,
        weights: Mapping[str, PatchedWeight],
        poll: Poll | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Change the model's weights to those of the file but for ``weights``.

        ``weights``: name in the file → changes, whose factors are tensors or numbers. Tensors
        that the ranks hold, for this or another model, are not sent again.

        Raises:
            As ``call`` does.
        """
        for portion in self._sender.not_held(weights):
            self.call(functools.partial(self._sender.hold, factors=portion), poll=poll)
        patch = functools.partial(self._sender.patch, model=model, weights=weights)
        self.call(patch, poll=poll, on_sent=on_sent)

    def unload(self, model: str, poll: Poll | None = None) -> None:
        """Free the model's shards. Raises as ``call`` does."""
        self._sender.forget_patches(model)
        self.call(lambda call: Unload(call, model), poll=poll)

    @contextlib.contextmanager
    def _turn_taken(self, poll: Poll | None) -> Iterator[None]:
        """Be the only caller, once no request is under way (an abandoned one may still be)."""
        while not self._turn.acquire(timeout=POLL_S):
            if poll is not None:
                poll()
        try:
            call = self._call
            if call is not None:
                while not call.finished.wait(POLL_S):
                    if poll is not None:
                        poll()
            yield
        finally:
            self._turn.release()

    def _send(self, make: Callable[[int], Request], kind: Hashable = None) -> _Call:
        number = next(self._numbers)
        with self._preparing:
            self._check_ready()
            request = make(number)
        frame = encode(request)
        timeout_s = self._step_times.timeout_s(kind, self.config.call_timeout_s)
        call = _Call(number, len(self.ranks), timeout_s, type(request).__name__, kind)
        with self._lock:
            self._check_ready()
            self.state = State.BUSY
            self._call = call  # the owner sees its deadline within WATCH_S
        for rank in self.ranks:
            try:
                rank.channel.send(frame)
            except EOFError:
                call.sent = False  # the owner sees the same end of the stream and fails the group
        return call

    def _check_ready(self) -> None:
        if self._lost or (self.state is State.READY and self._has_dead_rank()):
            raise GroupLostError(
                "The process group failed while nothing was asked of it. The next request starts "
                "a new one."
            )
        if self.state is State.FAILED:
            raise GroupClosedError(
                f"The process group has failed before: {self.error} Queue the prompt again."
            )
        if self.state is not State.READY or self._close_asked:
            raise GroupClosedError("The process group has been closed, or was never started.")

    def _wait(
        self, call: _Call, poll: Poll | None = None, on_progress: OnProgress | None = None
    ) -> None:
        shown = (0, 0)

        def show_progress() -> None:
            nonlocal shown
            if on_progress is not None and call.progress:
                parts = list(call.progress.values())
                now = (sum(done for done, _ in parts), sum(total for _, total in parts))
                if now != shown:
                    on_progress(*now)
                    shown = now

        while not call.finished.wait(POLL_S):
            if poll is not None:
                poll()
            show_progress()
        show_progress()  # a fast request ends before the first look at it

    # --- the owner's thread --------------------------------------------------------------------

    def _own(self) -> None:
        try:
            self.ranks = self._launcher.launch(self.config, self._sender.exchange)
            self._watch()
        except TPRuntimeError as error:
            self._end(State.FAILED, error)
        except BaseException as error:
            logger.exception("a fault of the engine")
            self._end(State.FAILED, TPRuntimeError(f"A fault of the engine: {error!r}"))

    def _watch(self) -> None:
        channels = [rank.channel for rank in self.ranks]
        sources = [self._wake_fd, *channels, *(rank.death_fd for rank in self.ranks)]
        while self.state not in _FINAL:
            call = self._call
            began = time.monotonic()
            timeout_s = WATCH_S
            if call is not None:
                timeout_s = min(max(0.0, call.deadline - began), WATCH_S)
            ready = wait(sources, timeout_s)
            if call is not None:
                late_s = time.monotonic() - began - timeout_s
                if late_s > FROZEN_S:  # so the ranks stood still, too
                    call.deadline += late_s
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            error = self._receive(ready)
            call = self._call
            if error is None and call is not None and time.monotonic() >= call.deadline:
                silent = [rank for rank in self.ranks if rank.index not in call.answers]
                self._blamed = silent[0]
                error = failures.silence(silent, call.timeout_s, call.what)
            if error is not None:
                self._end(State.FAILED, error)
            elif self._close_asked:
                self._close_now()

    def _receive(self, ready: list[Any]) -> TPRuntimeError | None:
        """Take what the ranks have sent; returns what ends the group, if something does.

        Where a rank ends, the others' collectives fail a moment later. So a rank that ended
        without a word is the cause; otherwise, the one that raised first.
        """
        gone: list[Rank] = []
        failed: list[tuple[Rank, Failed]] = []
        for rank in self.ranks:
            last_words = None
            try:
                for frame in rank.channel.receive():
                    reply = decode_reply(frame)
                    if isinstance(reply, Failed) and not reply.recoverable:
                        last_words = reply
                    else:
                        self._take(rank, reply)
            except TPRuntimeError as error:
                self._blamed = rank
                return error
            if last_words is not None:
                failed.append((rank, last_words))
            elif rank.channel.ended or rank.death_fd in ready:
                gone.append(rank)
        doing = self._call.what if self._call else None
        if gone:
            self._blamed = gone[0]
            return failures.death(gone[0], doing)
        if failed:
            self._blamed, cause = min(failed, key=lambda failure: failure[1].time_s)
            return failures.rank_error(self.config, self._blamed, cause, doing)
        return None

    def _take(self, rank: Rank, reply: Reply) -> None:
        """Note an answer, and finish the call that it completes.

        Raises:
            ProtocolError: the answer fits no request, or not the other ranks' answers.
            GroupStartError: the ranks are ready, but not as one group.
        """
        call = self._call
        number = _START if isinstance(reply, Ready) else reply.call
        if (
            call is None
            or number != call.number
            or rank.index in call.answers
            or isinstance(reply, Ready) != (number == _START)
        ):
            raise ProtocolError(f"Rank {rank.index} sent an answer that nothing had asked for.")
        if isinstance(reply, Progress):
            call.progress[rank.index] = (reply.done, reply.total)
            call.deadline = time.monotonic() + call.timeout_s
            return
        call.answers[rank.index] = reply
        if not call.complete():
            return
        if len({type(answer) for answer in call.answers.values()}) != 1:
            raise ProtocolError("Some ranks refused a request that others carried out.")
        if number == _START:
            self.ready = [answer for _, answer in sorted(call.answers.items())]  # type: ignore[misc]
            self._check_sizes()
        if call.kind is not None and isinstance(reply, Done):
            self._step_times.record(call.kind, time.monotonic() - call.began)
        with self._lock:
            self.state = State.READY
            self._call = None
        call.finished.set()

    def _check_sizes(self) -> None:
        seen = [ready.tp_world_size for ready in self.ready]
        if seen != [self.config.tp_size] * self.config.tp_size:
            raise GroupStartError(
                f"A group of {self.config.tp_size} ranks was asked for, but the ranks see tensor-"
                f"parallel sizes {seen}. This is a fault of the installation of vLLM in the "
                f"runtime's Python {self.config.python}."
            )

    def log_tail(self) -> str:
        """The end of the log of the rank that failed; empty while none has."""
        return self._blamed.log_tail() if self._blamed else ""

    # --- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the group in an orderly way: ask, wait, kill. Idempotent; from any thread."""
        with self._lock:
            self._close_asked = True  # from here on no request is taken
            owner = self._owner
            if owner is not None and self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)
        if owner is None:
            self._end(State.CLOSED, None)
        else:
            owner.join()

    def _close_now(self) -> None:
        if self.state is not State.READY:  # it would not listen
            self._end(State.CLOSED, None)
            return
        for rank in self.ranks:
            with contextlib.suppress(EOFError):  # it is gone already, which is what we want
                rank.channel.send(encode(Close()))
        self._end(State.CLOSED, None, grace_s=CLOSE_TIMEOUT_S)

    def _end(self, state: State, error: TPRuntimeError | None, grace_s: float = 0.0) -> None:
        """Leave nothing of the group. Done by the owner, if there is one."""
        with self._lock:
            if self.state in _FINAL:
                return
            self.error = error
            self._lost = self._call is None and error is not None
            self.state = state
            call, self._call = self._call, None
            os.close(self._wake_fd)
            self._wake_fd = -1
        if error is not None:
            logger.error("%s", error)
        try:
            end_ranks(self.ranks, grace_s)
            with self._preparing:
                self._sender.exchange.close()
            self._launcher.clean_up(keep_logs=error is not None)
        finally:
            if call is not None:
                call.error = error or GroupClosedError("The process group was closed meanwhile.")
                call.finished.set()
