"""The processes of a group: their start, watching over them, their end.

One thread owns them: it starts them, listens to them, is the only one that decides that a group has
failed (on a rank's death, on an error of a rank, or when a request has taken too long), and ends
them.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from .. import reasons
from ..config import GroupConfig
from ..errors import GroupClosedError, GroupStartError, TPRuntimeError
from ..wire.exchange import Exchange
from ..wire.mirror import pieces
from ..wire.protocol import Close, Ready, encode
from . import failures
from .call import START, Call
from .group_state import GroupState, State
from .hearing import Hearing
from .launch.launcher import Launcher, Rank, end_ranks
from .poll import Poll
from .rank_events import RankEvents

logger = logging.getLogger("tp_runtime")

CLOSE_TIMEOUT_S = 5.0
_CLOSED = "Release or Restart ended the processes while this ran. Run it again."
WATCH_S = 1.0  # the owner looks at least this often
FROZEN_S = 2.0  # if the owner looks later than planned by more, the machine stood still


class RankProcesses:
    """The ranks of a group, and the calls that are under way. Thread-safe.

    A new object has no processes; ``start`` makes them and ``close`` ends them, once each.
    ``exchange_in_use``: to be held while ``exchange`` is written or read, which is given back
    with the group.
    """

    def __init__(self, config: GroupConfig, launcher: Launcher, exchange: Exchange) -> None:
        self.config = config
        self.exchange_in_use = threading.Lock()
        self._launcher = launcher
        self._exchange = exchange
        self._events = RankEvents()
        self._state = GroupState(self._is_failing)
        self._hearing = Hearing(config, exchange, self._state)
        # Set once ``start`` has an owner's thread running, or has failed and cleaned up.
        self._prepared = threading.Event()
        self._owner: threading.Thread | None = None

    @property
    def state(self) -> State:
        return self._state.now

    @property
    def error(self) -> TPRuntimeError | None:
        """What the group has failed of."""
        return self._state.error

    @property
    def calls_under_way(self) -> Sequence[Call]:
        """What the ranks have not all answered yet, one after the other."""
        return self._state.calls

    @property
    def ranks(self) -> Sequence[Rank]:
        return self._hearing.ranks

    @property
    def ready(self) -> Sequence[Ready]:
        """What each rank said when it was ready."""
        return self._hearing.ready

    @property
    def num_ready(self) -> int:
        """How many ranks have said so."""
        call = self._state.call if self.state is State.STARTING else None
        return len(self.ready) if call is None else len(call.answers)

    def is_up(self) -> bool:
        """Whether the group has started, and all its ranks live."""
        return self.state in (State.READY, State.BUSY) and not self._is_failing()

    def _is_failing(self) -> bool:
        """Whether a rank has raised or ended, so that the owner is about to end the group."""
        return bool(self._hearing.evidence) or self._events.has_end()

    def log_tail(self) -> str:
        """The end of the log of the rank that failed; empty while none has."""
        return self._hearing.evidence.log_tail()

    # --- start ---------------------------------------------------------------------------------

    def start(self, poll: Poll | None = None) -> None:
        """Start the ranks and wait until every one is ready.

        Raises:
            GroupStartError: a rank ended, raised or stayed silent, or sees another TP size than
                the one asked for. Nothing is left running. Whatever ``poll`` raises ends the
                group, too.
        """
        call = Call(START, self.config.num_ranks, self.config.start_timeout_s, "start")
        self._state.begin_start(call)
        try:
            self._prepare(call, poll)
        finally:
            self._prepared.set()
        try:
            call.wait(poll)
        except BaseException:  # poll raised it
            self.close()
            raise
        if isinstance(call.error, GroupStartError | GroupClosedError):
            call.raise_error()
        if call.error is not None:
            blamed = self._hearing.evidence.blamed
            raise failures.not_started(self.config, self.ranks, blamed, call.error)

    def _prepare(self, call: Call, poll: Poll | None) -> None:
        """Have what the launcher needs for the ranks, and the owner; or end the group."""

        def poll_start() -> None:
            self._state.check_not_closed()
            if poll is not None:
                poll()

        try:
            self._launcher.prepare(self.config, poll_start)
            self._state.check_not_closed()
            call.deadline = time.monotonic() + call.timeout_s
            owner = threading.Thread(target=self._own, name="tp-runtime-group", daemon=True)
            try:
                owner.start()
            except RuntimeError as error:  # threading's: there are too many
                raise GroupStartError(
                    f"The process group cannot be watched: {reasons.of(error)}"
                ) from error
            self._owner = owner
        except GroupStartError as error:
            self._end(State.FAILED, error)
            raise
        except BaseException:  # poll raised it, or the group was closed
            self._end(State.CLOSED, None)
            raise

    # --- requests ------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Raises GroupLostError or GroupClosedError unless the group takes a request now."""
        self._state.check_ready()

    def send(self, call: Call, frame: bytes, written: Sequence[tuple[int, memoryview]]) -> None:
        """Send a request to every rank; from now on it is under way.

        Its deadline counts when no other one is before it.

        ``written``: what belongs to it in the exchange memory (offset and bytes), for ranks that
        do not share that. Raises as ``check_ready``.
        """
        self._state.begin(call)  # the owner sees its deadline within WATCH_S
        try:
            for rank in self.ranks:
                for piece in pieces(written) if rank.mirrored else ():
                    rank.channel.send(encode(piece))
                rank.channel.send(frame)
        except EOFError:
            call.sent = False  # the owner sees the same end of the stream and fails the group

    # --- the owner's thread --------------------------------------------------------------------

    def _own(self) -> None:
        try:
            self._hearing.ranks = self._launcher.launch(
                self.config, self._exchange, self._state.check_not_closed
            )
            self._events.watch(self.ranks)
            self._watch()
        except GroupClosedError:
            self._end(State.CLOSED, None)
        except TPRuntimeError as error:
            self._end(State.FAILED, error)
        except BaseException as error:
            logger.exception("a fault of the engine")
            self._end(State.FAILED, TPRuntimeError(f"A fault of the engine: {error!r}"))

    def _watch(self) -> None:
        while not self._state.is_final:
            # Looked up before what the ranks have done: a death that came first is a failure.
            close_asked = self._state.close_asked
            call = self._state.call
            began = time.monotonic()
            timeout_s = WATCH_S
            if call is not None:
                timeout_s = min(max(0.0, call.deadline - began), WATCH_S)
            happened = self._events.wait(0 if close_asked else timeout_s)
            late_s = time.monotonic() - began - timeout_s
            call = self._state.call  # which may have begun meanwhile
            if call is not None and late_s > FROZEN_S:  # so the ranks stood still, too
                call.deadline += late_s
            error = self._hearing.failure(happened)
            call = self._state.call
            if error is None and call is not None and time.monotonic() >= call.deadline:
                silent = [rank for rank in self.ranks if rank.index not in call.answers]
                if silent:
                    error = self._hearing.evidence.silence(silent, call.timeout_s, call.what)
            if error is not None:
                self._end(State.FAILED, error)
            elif close_asked:
                self._close_now()

    # --- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """End the group in an orderly way: ask, wait, kill. Idempotent; from any thread."""
        is_begun = self._state.ask_to_close()
        self._events.call_owner()
        if not is_begun:
            self._end(State.CLOSED, None)
            return
        self._prepared.wait()  # the starting thread sees the wish, too, and ends what there is
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

    def _end(self, final: State, error: TPRuntimeError | None, grace_s: float = 0.0) -> None:
        """Leave nothing of the group. Done by the owner, if there is one."""
        to_finish = self._state.end(final, error)
        if to_finish is None:
            return
        if error is not None:
            logger.error("%s", str(error))  # not the object, which would keep what it went through
        try:
            end_ranks(self.ranks, grace_s)
            self._events.close()
            # Whoever has the exchange may be waiting for a stream that waits for the ranks.
            self._exchange.release()
            with self.exchange_in_use:
                self._exchange.close()
            self._launcher.clean_up(keep_logs=error is not None)
        finally:
            for call in to_finish:
                call.finish(error or GroupClosedError(_CLOSED))
