"""One process group, seen from ComfyUI's process: states, calls, cancelling, ending.

Part of the engine's half. A reader thread is the only one that listens to the ranks and the only
one that decides that a group has failed: on a rank's death, on an error of a rank, or when a
request has taken too long. Callers wait on the request they made and may abandon it at any time;
the ranks then finish it for themselves and the next request waits for that.

::

    STARTING ──► READY ◄──► BUSY
        │          │          │
        └──────────┴──────────┴──► FAILED or CLOSED   (no process of the group is left)
"""

import contextlib
import enum
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .config import GroupConfig
from .errors import (
    REFUSALS,
    CallTimeoutError,
    GroupClosedError,
    GroupDiedError,
    GroupStartError,
    ProtocolError,
    RankError,
    TPRuntimeError,
)
from .launcher import Launcher, LocalLauncher, Rank
from .protocol import (
    PER_STEP_INPUTS,
    Close,
    Denoise,
    Done,
    Failed,
    Progress,
    Ready,
    Reply,
    Request,
    TensorRef,
    decode_reply,
    encode,
    pack_inputs,
)
from .tensors import Exchange, HeldTensors, Layout, dtype_name
from .transport import wait

logger = logging.getLogger("tp_runtime")

POLL_S = 0.01
CLOSE_TIMEOUT_S = 5.0

Poll = Callable[[], None]
OnProgress = Callable[[int, int], None]


class State(enum.Enum):
    """What a group can be. FAILED and CLOSED are final."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    CLOSED = "closed"


class _Call:
    """One request under way: what each rank has answered so far."""

    def __init__(self, number: int, num_ranks: int, timeout_s: float, what: str) -> None:
        self.number = number
        self.what = what
        self.deadline = time.monotonic() + timeout_s
        self.timeout_s = timeout_s
        self.answers: dict[int, Ready | Done | Failed] = {}
        self.num_ranks = num_ranks
        self.progress: dict[int, tuple[int, int]] = {}
        self.error: TPRuntimeError | None = None
        self.finished = threading.Event()

    def complete(self) -> bool:
        return len(self.answers) == self.num_ranks

    def raise_refusal(self) -> None:
        """Raise the error with which the ranks refused the request, if they did."""
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
        self._exchange = Exchange.create()
        self._held = HeldTensors()
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()  # held by the caller whose request is being prepared
        self._lock = threading.Lock()  # guards state, error and _call
        self._call: _Call | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._close_asked = False
        self._reader: threading.Thread | None = None

    # --- start ---------------------------------------------------------------------------------

    def start(self, poll: Poll | None = None) -> None:
        """Start the ranks and wait until every one is ready.

        Raises:
            GroupStartError: a rank ended, raised or stayed silent, or sees another TP size than
                the one asked for. Nothing is left running. Whatever ``poll`` raises ends the
                group, too.
        """
        config = self.config
        call = _Call(0, config.tp_size, config.start_timeout_s, "start")
        self._call = call
        try:
            self.ranks = self._launcher.launch(config, self._exchange)
        except TPRuntimeError:
            self.close()
            raise
        self._reader = threading.Thread(target=self._read, name="tp-runtime-reader", daemon=True)
        self._reader.start()
        try:
            self._wait(call, poll)
        except TPRuntimeError as error:
            raise GroupStartError(self._start_message(error)) from error
        except BaseException:
            self.close()
            raise
        self.ready = [answer for _, answer in sorted(call.answers.items())]  # type: ignore[misc]
        seen = [ready.tp_world_size for ready in self.ready]
        if seen != [config.tp_size] * config.tp_size:
            self.close()
            raise GroupStartError(
                f"A group of {config.tp_size} ranks was asked for, but the ranks see tensor-"
                f"parallel sizes {seen}. This is a fault of the installation of vLLM."
            )

    def _start_message(self, error: TPRuntimeError) -> str:
        rank = self.ranks[0]
        for candidate in self.ranks:
            if candidate.process.poll() not in (None, 0, -9):
                rank = candidate
                break
        return (
            f"The process group of {self.config.tp_size} {self.config.device.upper()} ranks did "
            f"not start: {error} Runtime Python: {self.config.python}. "
            f"Log: {rank.log_path}, which ends:\n{rank.log_tail()}"
        )

    # --- requests ------------------------------------------------------------------------------

    def call(
        self,
        make: Callable[[int], Request],
        *,
        poll: Poll | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Any]:
        """Send one request to every rank; return each rank's ``Done.value``, in rank order.

        ``make`` gets the request's number. ``poll`` is called every 10 ms or so while waiting; if
        it raises, the request is abandoned and what it raised goes on to the caller.

        Raises:
            InputError: the ranks refused the request; the group is as before.
            RankError, GroupDiedError, CallTimeoutError: the group has been ended.
            GroupClosedError: it had been ended before.
        """
        with self._turn_taken(poll):
            call = self._send(make)
            self._wait(call, poll, on_progress)
        call.raise_refusal()
        return [answer.value for _, answer in sorted(call.answers.items())]  # type: ignore[union-attr]

    def denoise(
        self, model: str, inputs: Mapping[str, Any], poll: Poll | None = None
    ) -> torch.Tensor:
        """Evaluate the transformer once; returns a CPU tensor of the shape and dtype of ``x``.

        ``inputs`` are ComfyUI's forward arguments: a tensor ``x`` and plain data with tensors.
        Tensors that the ranks hold from an earlier call are not sent again.

        Raises:
            As ``call`` does, and ProtocolError if ``inputs`` hold something that cannot be sent.
        """
        x: torch.Tensor = inputs["x"]
        results: list[TensorRef] = []

        def make(number: int) -> Request:
            layout = Layout()
            in_use: set[int] = set()
            tree = {
                name: self._place(value, layout, in_use, hold=name not in PER_STEP_INPUTS)
                for name, value in inputs.items()
            }
            offset = layout.reserve(x.nbytes)
            layout.write_to(self._exchange)
            results.append(TensorRef(tuple(x.shape), dtype_name(x.dtype), offset))
            return Denoise(
                call=number,
                model=model,
                inputs=pack_inputs(tree),
                drop=list(self._held.evict(in_use)),
                exchange_bytes=self._exchange.size,
                result=results[0],
            )

        with self._turn_taken(poll):
            first_new = self._held.next_key
            try:
                call = self._send(make)
            except TPRuntimeError:
                self._held.forget_from(first_new)  # the ranks never got them
                raise
            self._wait(call, poll)
            call.raise_refusal()
            return self._exchange.view(results[0]).clone()

    def _place(self, value: Any, layout: Layout, in_use: set[int], hold: bool) -> Any:
        """``value`` with every tensor replaced by a reference to it."""
        if isinstance(value, torch.Tensor):
            if not hold:
                return layout.place(value)
            key = self._held.find(value)
            if key:
                ref = TensorRef(tuple(value.shape), dtype_name(value.dtype), -1, key)
            else:
                key = self._held.add(value)
                ref = layout.place(value, key)
            in_use.add(key)
            return ref
        if isinstance(value, Mapping):
            return {k: self._place(v, layout, in_use, hold) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._place(v, layout, in_use, hold) for v in value]
        return value

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

    def _send(self, make: Callable[[int], Request]) -> _Call:
        self._check_alive()
        number = next(self._numbers)
        request = make(number)
        frame = encode(request)
        call = _Call(number, len(self.ranks), self.config.call_timeout_s, type(request).__name__)
        with self._lock:
            if self.state is State.READY:
                self.state = State.BUSY
                self._call = call
                os.eventfd_write(self._wake_fd, 1)  # the reader has a new deadline to watch
        self._check_alive()
        try:
            for rank in self.ranks:
                rank.channel.send(frame)
        except EOFError:
            pass  # the reader sees the same end of stream and fails the group
        return call

    def _check_alive(self) -> None:
        with self._lock:
            if self.state is State.FAILED:
                raise GroupClosedError(f"The process group has failed before: {self.error}")
            if self.state is State.CLOSED:
                raise GroupClosedError("The process group has been closed.")

    def _wait(
        self, call: _Call, poll: Poll | None = None, on_progress: OnProgress | None = None
    ) -> None:
        shown = (0, 0)
        while not call.finished.wait(POLL_S):
            if poll is not None:
                poll()
            if on_progress is not None and call.progress:
                parts = list(call.progress.values())
                now = (sum(done for done, _ in parts), sum(total for _, total in parts))
                if now != shown:
                    on_progress(*now)
                    shown = now
        if call.error is not None:
            raise call.error

    # --- the reader thread ---------------------------------------------------------------------

    def _read(self) -> None:
        channels = {rank.channel: rank for rank in self.ranks}
        deaths = {rank.death_fd: rank for rank in self.ranks}
        while self.state not in (State.FAILED, State.CLOSED):
            call = self._call
            timeout_s = None if call is None else max(0.0, call.deadline - time.monotonic())
            ready = wait([*channels, *deaths, self._wake_fd], timeout_s)
            for rank in [channels[source] for source in ready if source in channels]:
                try:
                    self._handle(rank, decode_reply(rank.channel.receive()))
                except EOFError:
                    self._fail(self._death(rank))
                except ProtocolError as error:
                    self._fail(error)
            for rank in [deaths[source] for source in ready if source in deaths]:
                self._fail(self._death(rank))
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if self._close_asked:
                self._close_now()
            call = self._call
            if call is not None and time.monotonic() >= call.deadline:
                self._fail(self._silence(call))

    def _silence(self, call: _Call) -> TPRuntimeError:
        silent = [rank.index for rank in self.ranks if rank.index not in call.answers]
        return CallTimeoutError(
            f"Ranks {silent} gave no sign of life for {call.timeout_s:g} s during '{call.what}'; "
            f"the group was ended. The next request starts a new one. "
            f"Logs: {self.ranks[0].log_path.parent}"
        )

    def _death(self, rank: Rank) -> TPRuntimeError:
        rank.process.poll()
        if rank.process.returncode is None:
            # The stream ends a moment before the process does.
            wait([rank.death_fd], 1.0)
        doing = f" during '{self._call.what}'" if self._call else ""
        return GroupDiedError(
            f"Rank {rank.index} (process {rank.pid}) {rank.describe_exit()}{doing}; the group was "
            f"ended. The next request starts a new one. Log: {rank.log_path}"
        )

    def _rank_error(self, rank: Rank, failed: Failed) -> TPRuntimeError:
        logger.error("rank %d:\n%s", rank.index, failed.traceback)
        doing = f" during '{self._call.what}'" if self._call else ""
        return RankError(
            f"Rank {rank.index} raised {failed.kind}{doing}: {failed.message} The group was "
            f"ended; the next request starts a new one. Log: {rank.log_path}"
        )

    def _handle(self, rank: Rank, reply: Reply) -> None:
        call = self._call
        if isinstance(reply, Failed) and not reply.recoverable:
            self._fail(self._rank_error(rank, reply))
            return
        number = 0 if isinstance(reply, Ready) else reply.call
        if self.state in (State.FAILED, State.CLOSED):
            return  # another rank's message in the same batch has ended the group
        if call is None or number != call.number or rank.index in call.answers:
            raise ProtocolError(f"Rank {rank.index} sent an answer that nothing had asked for.")
        if isinstance(reply, Progress):
            call.progress[rank.index] = (reply.done, reply.total)
            call.deadline = time.monotonic() + call.timeout_s
            return
        call.answers[rank.index] = reply
        if call.complete():
            kinds = {type(answer) for answer in call.answers.values()}
            if len(kinds) != 1:
                self._fail(ProtocolError("Some ranks refused a request that others carried out."))
                return
            with self._lock:
                self.state = State.READY
                self._call = None
            call.finished.set()

    # --- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the group in an orderly way: ask, wait, kill. Idempotent; from any thread."""
        self._close_asked = True
        if self._reader is None:
            self._end(State.CLOSED, None, grace_s=0.0)
        else:
            with self._lock:
                if self._wake_fd >= 0:
                    os.eventfd_write(self._wake_fd, 1)
            self._reader.join()
        with self._lock:
            if self._wake_fd >= 0:
                os.close(self._wake_fd)
                self._wake_fd = -1

    def _close_now(self) -> None:
        idle = self.state is State.READY
        if idle:
            for rank in self.ranks:
                with contextlib.suppress(EOFError):  # it is gone already, which is what we want
                    rank.channel.send(encode(Close()))
        self._end(State.CLOSED, None, grace_s=CLOSE_TIMEOUT_S if idle else 0.0)

    def _fail(self, error: TPRuntimeError) -> None:
        self._end(State.FAILED, error, grace_s=0.0)

    def _end(self, state: State, error: TPRuntimeError | None, grace_s: float) -> None:
        """Leave nothing of the group. Only the reader thread does this, once there is one."""
        with self._lock:
            if self.state in (State.FAILED, State.CLOSED):
                return
            self.state = state
            self.error = error
            call, self._call = self._call, None
        deadline = time.monotonic() + grace_s
        for rank in self.ranks:
            rank.end(max(0.0, deadline - time.monotonic()))
        self._exchange.close()
        self._launcher.clean_up(keep_logs=error is not None)
        if call is not None:
            call.error = error or GroupClosedError("The process group was closed meanwhile.")
            call.finished.set()
