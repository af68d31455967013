"""The processes of a group: their start, watching over them, their end. Part of the engine's half.

One thread owns them: it starts them, listens to them, is the only one that decides that a group has
failed (on a rank's death, on an error of a rank, or when a request has taken too long), and ends
them. A caller who does not want to be woken up may listen, too (``_listen``).

::

    STARTING ──► READY ◄──► BUSY
        │          │          │
        └──────────┴──────────┴──► FAILED or CLOSED   (no process of the group is left)
"""

import contextlib
import enum
import logging
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

from ..config import GroupConfig
from ..errors import GroupClosedError, GroupStartError, ProtocolError, TPRuntimeError
from ..wire.exchange import Exchange
from ..wire.protocol import Close, Failed, Piece, Ready, Reply, decode_reply, encode
from ..wire.transport import Readiness, wait
from . import failures
from .call import START, Call, unasked
from .launch.launcher import Launcher, Poll, Rank, end_ranks

logger = logging.getLogger("tp_runtime")

CLOSE_TIMEOUT_S = 5.0
WATCH_S = 1.0  # the owner looks at least this often
CAUSE_S = 0.2  # after an error of a rank, another's end may be seen that caused it
OTHER_HOSTS_CAUSE_S = 0.5  # where it is on another host
FROZEN_S = 2.0  # a look that is later by more: the machine, or its container, stood still


class State(enum.Enum):
    """What a group can be. FAILED and CLOSED are final."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    CLOSED = "closed"


_FINAL = (State.FAILED, State.CLOSED)


class ProcessGroup:
    """The ranks, and the call that is under way. Thread-safe.

    A new object has no processes; ``start`` makes them and ``close`` ends them, once each.
    """

    def __init__(self, config: GroupConfig, launcher: Launcher, exchange: Exchange) -> None:
        self.config = config
        self.state = State.STARTING
        self.error: TPRuntimeError | None = None
        self.ranks: Sequence[Rank] = ()
        self.ready: list[Ready] = []
        self._launcher = launcher
        self._exchange = exchange
        self._exchange_in_use = threading.Lock()  # held while it is written, or given back
        self._lock = threading.Lock()  # guards state, error, _call, _close_asked and _wake_fd
        self._hearing = threading.Lock()  # held by who takes what the ranks have sent; before _lock
        # Of the ranks' ends; and of these, of their channels and of the owner's wake-up.
        self._deaths: Readiness | None = None
        self._events: Readiness | None = None
        self._call: Call | None = None
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._close_asked = False
        self._preparing: threading.Event | None = None  # set when there is an owner, or the end
        self._owner: threading.Thread | None = None
        self._last_words: dict[int, Failed] = {}  # of the ranks that have raised
        self._fault: TPRuntimeError | None = None  # of what a rank has sent
        self._blamed: Rank | None = None

    def is_up(self) -> bool:
        """Whether the group has started, and all its ranks live."""
        return self.state in (State.READY, State.BUSY) and not self._is_failing()

    def _is_failing(self) -> bool:
        """Whether a rank has raised or ended, so that the owner is about to end the group."""
        return self._is_accused() or (self._deaths is not None and bool(self._deaths.wait(0)))

    def _is_accused(self) -> bool:
        """Whether a rank has raised, or sent what it should not have."""
        return self._fault is not None or bool(self._last_words)

    # --- start ---------------------------------------------------------------------------------

    def start(self, poll: Poll | None = None) -> None:
        """Start the ranks and wait until every one is ready.

        Raises:
            GroupStartError: a rank ended, raised or stayed silent, or sees another TP size than
                the one asked for. Nothing is left running. Whatever ``poll`` raises ends the
                group, too.
        """
        call = Call(START, self.config.num_ranks, self.config.start_timeout_s, "start")
        with self._lock:
            self._check_not_closed()
            assert self._preparing is None, "a group is started once"
            self._preparing = threading.Event()
            self._call = call
        try:
            self._prepare(call, poll)
        finally:
            self._preparing.set()
        try:
            call.wait(poll)
        except BaseException:  # poll raised it
            self.close()
            raise
        if isinstance(call.error, GroupStartError | GroupClosedError):
            call.raise_error()
        if call.error is not None:
            raise failures.not_started(self.config, self.ranks, self._blamed, call.error)

    def _prepare(self, call: Call, poll: Poll | None) -> None:
        """Have what the launcher needs for the ranks, and the owner; or end the group."""

        def poll_start() -> None:
            self._check_not_closed()
            if poll is not None:
                poll()

        try:
            self._launcher.prepare(self.config, poll_start)
            with self._lock:
                self._check_not_closed()
                call.deadline = time.monotonic() + call.timeout_s
                owner = threading.Thread(target=self._own, name="tp-runtime-group", daemon=True)
                owner.start()
                self._owner = owner
        except GroupStartError as error:
            self._end(State.FAILED, error)
            raise
        except BaseException:  # poll raised it, or the group was closed
            self._end(State.CLOSED, None)
            raise

    def _check_not_closed(self) -> None:
        if self._close_asked:
            raise GroupClosedError("The process group was closed before it had started.")

    # --- requests ------------------------------------------------------------------------------

    def _check_ready(self) -> None:
        if self.state is State.FAILED or (self.state is State.READY and self._is_failing()):
            raise failures.lost(self.error)
        if self.state is not State.READY or self._close_asked:
            raise GroupClosedError("The process group has been closed, or was never started.")

    def _begin(self, call: Call) -> None:
        """From now on this is the call under way: its deadline counts. Raises as _check_ready."""
        with self._lock:
            self._check_ready()
            self.state = State.BUSY
            self._call = call  # the owner sees its deadline within WATCH_S

    def _listen(self, call: Call, until: float) -> None:
        """Take the answers to a call as they come, until it has ended, or until that time.

        For its caller, shortly before they are due, without sleeping: a core that was asleep wakes
        up slowly, and is slow at everything that comes next.
        """
        assert self._events is not None, "a call is under way, so the group has started"
        channels = [rank.channel for rank in self.ranks]
        try:
            self._events.mute(channels, True)  # or the owner would wake up, too, and be in the way
            while not (call.finished.is_set() or self._is_accused() or time.monotonic() >= until):
                self._hear()
        finally:
            self._events.mute(channels, False)
            if self._is_accused():
                self._wake_owner()

    def _wake_owner(self) -> None:
        with self._lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    # --- the owner's thread --------------------------------------------------------------------

    def _own(self) -> None:
        try:
            self.ranks = self._launcher.launch(self.config, self._exchange, self._check_not_closed)
            channels = [rank.channel for rank in self.ranks]
            deaths = [rank.death_fd for rank in self.ranks]
            self._deaths = Readiness(deaths)
            self._events = Readiness([self._wake_fd, *channels, *deaths])
            self._watch(self._events)
        except GroupClosedError:
            self._end(State.CLOSED, None)
        except TPRuntimeError as error:
            self._end(State.FAILED, error)
        except BaseException as error:
            logger.exception("a fault of the engine")
            self._end(State.FAILED, TPRuntimeError(f"A fault of the engine: {error!r}"))

    def _watch(self, events: Readiness) -> None:
        while self.state not in _FINAL:
            # Looked up before what the ranks have done: a death that came first is a failure.
            close_asked = self._close_asked
            call = self._call
            began = time.monotonic()
            timeout_s = WATCH_S
            if call is not None:
                timeout_s = min(max(0.0, call.deadline - began), WATCH_S)
            ready = events.wait(0 if close_asked else timeout_s)
            late_s = time.monotonic() - began - timeout_s
            call = self._call  # which may have begun meanwhile
            if call is not None and late_s > FROZEN_S:  # so the ranks stood still, too
                call.deadline += late_s
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            error = self._receive(ready)
            call = self._call
            if error is None and call is not None and time.monotonic() >= call.deadline:
                silent = [rank for rank in self.ranks if rank.index not in call.answers]
                if silent:  # or a caller has taken the last answer meanwhile
                    self._blamed = silent[0]
                    error = failures.silence(silent, call.timeout_s, call.what)
            if error is not None:
                self._end(State.FAILED, error)
            elif close_asked:
                self._close_now()

    def _receive(self, ready: list[Any]) -> TPRuntimeError | None:
        """Take what the ranks have sent; returns what ends the group, if something does.

        Where a rank ends, the others' collectives fail a moment later. So a rank that ended
        without a word is the cause; otherwise, the one that raised first.
        """
        self._hear()
        if self._last_words and self._fault is None and not self._gone(ready):
            # The cause may be seen after what it caused: on a busy machine this thread has
            # looked at one rank long before another.
            quiet = [rank for rank in self.ranks if rank.index not in self._last_words]
            far = [rank.channel for rank in quiet if rank.mirrored]
            timeout_s = OTHER_HOSTS_CAUSE_S if far else CAUSE_S
            ready = wait([*(rank.death_fd for rank in quiet), *far], timeout_s)
            self._hear()
        if self._fault is not None:
            return self._fault
        doing = self._call.what if self._call else None
        if gone := self._gone(ready):
            self._blamed = gone[0]
            return failures.death(self._blamed, doing)
        if self._last_words:
            self._blamed = min(
                (rank for rank in self.ranks if rank.index in self._last_words),
                key=lambda rank: self._last_words[rank.index].time_s - rank.clock_ahead_s,
            )
            last_words = self._last_words[self._blamed.index]
            return failures.rank_error(self.config, self._blamed, last_words, doing)
        return None

    def _gone(self, ready: list[Any]) -> list[Rank]:
        """The ranks that have ended without a word."""
        with self._hearing:  # a caller may have seen an end, and not yet have noted the last words
            return [
                rank
                for rank in self.ranks
                if rank.index not in self._last_words
                and (rank.channel.ended or rank.death_fd in ready)
            ]

    def _hear(self) -> None:
        """Take what has arrived from the ranks, by any thread; note what is wrong with it."""
        with self._hearing:
            if self.state in _FINAL or self._fault is not None:
                return
            for rank in self.ranks:
                try:
                    for frame in rank.channel.receive():
                        reply = decode_reply(frame)
                        if isinstance(reply, Failed) and not reply.recoverable:
                            self._last_words[rank.index] = reply
                        else:
                            self._take(rank, reply)
                except TPRuntimeError as error:
                    self._blamed, self._fault = rank, error
                    return
                except BaseException as error:  # a caller's Ctrl-C, too: frames may be lost
                    self._blamed = rank
                    self._fault = TPRuntimeError(f"A fault of the engine: {error!r}")
                    raise

    def _take(self, rank: Rank, reply: Reply) -> None:
        """Note an answer, and finish the call that it completes.

        Raises:
            ProtocolError: the answer fits no request, or not the other ranks' answers.
            GroupStartError: the ranks are ready, but not as one group.
        """
        call = self._call
        if isinstance(reply, Piece):
            if call is None or not rank.mirrored:
                raise ProtocolError(f"Rank {rank.index} sent bytes that nothing had asked for.")
            self._exchange.put(reply.offset, reply.data)
            return
        if call is None:
            raise unasked(rank.index)
        call.take(rank.index, reply)
        if not call.complete():
            return
        if call.number == START:
            self.ready = [answer for _, answer in sorted(call.answers.items())]  # type: ignore[misc]
            self._check_sizes()
        with self._lock:
            self.state = State.READY
            self._call = None
        call.finish()

    def _check_sizes(self) -> None:
        seen = [ready.tp_world_size for ready in self.ready]
        if seen != [self.config.tp_size] * self.config.num_ranks:
            raise GroupStartError(
                f"{self.config.num_ranks} ranks of tensor-parallel size {self.config.tp_size} were "
                f"asked for, but they see the sizes {seen}. This is a fault of the installation of "
                f"vLLM in the runtime's Python {self.config.python}."
            )

    def log_tail(self) -> str:
        """The end of the log of the rank that failed; empty while none has."""
        return self._blamed.log_tail() if self._blamed else ""

    # --- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the group in an orderly way: ask, wait, kill. Idempotent; from any thread."""
        with self._lock:
            self._close_asked = True  # from here on no request is taken
        self._wake_owner()
        if self._preparing is None:
            self._end(State.CLOSED, None)
            return
        self._preparing.wait()  # where the starting thread sees it, and ends what there is
        if self._owner is not None:
            self._owner.join()

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
        with self._hearing, self._lock:  # who is listening has stopped, and nobody begins
            if self.state in _FINAL:
                return
            self.error = error
            self.state = state
            call, self._call = self._call, None
            os.close(self._wake_fd)
            self._wake_fd = -1
        if error is not None:
            logger.error("%s", error)
        try:
            end_ranks(self.ranks, grace_s)
            for readiness in (self._deaths, self._events):
                if readiness is not None:
                    readiness.close()
            with self._exchange_in_use:
                self._exchange.close()
            self._launcher.clean_up(keep_logs=error is not None)
        finally:
            if call is not None:
                call.finish(error or GroupClosedError("The process group was closed meanwhile."))
