"""What a process group is at the moment, and how it gets from one state to the next.

::

    STARTING ──► READY ◄──► BUSY
        │          │          │
        └──────────┴──────────┴──► FAILED or CLOSED   (no process of the group is left)
"""

import copy
import enum
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ..errors import GroupClosedError, TPRuntimeError
from . import failures
from .call import Call


class State(enum.Enum):
    """What a group can be. FAILED and CLOSED are final."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    FAILED = "failed"
    CLOSED = "closed"


class GroupState:
    """The state of a group, and the calls that are under way. Thread-safe.

    ``error``: what the group has failed of. ``close_asked``: it is to end, and takes no request any
    more.
    """

    def __init__(self, is_failing: Callable[[], bool]) -> None:
        """``is_failing``: whether a rank has raised or ended, which the owner has yet to see."""
        self.now = State.STARTING
        self.error: TPRuntimeError | None = None
        self.close_asked = False
        self._is_failing = is_failing
        self._is_begun = False
        self._calls: deque[Call] = deque()
        self._lock = threading.Lock()  # guards all attributes

    @property
    def calls(self) -> Sequence[Call]:
        """What the ranks have not all answered yet. They carry out one after the other."""
        with self._lock:
            return list(self._calls)

    @property
    def call(self) -> Call | None:
        """The first of them."""
        with self._lock:
            return self._calls[0] if self._calls else None

    @property
    def is_final(self) -> bool:
        return self.now in (State.FAILED, State.CLOSED)

    def begin_start(self, call: Call) -> None:
        """The ranks are about to be started, which ``call`` waits for. Once.

        Raises:
            GroupClosedError: the group was closed before.
        """
        with self._lock:
            self.check_not_closed()
            assert not self._is_begun, "a group is started once"
            self._is_begun = True
            self._calls.append(call)

    def check_not_closed(self) -> None:
        """Raises GroupClosedError if the group is to end before it has started."""
        if self.close_asked:
            raise GroupClosedError(
                "The process group was closed before it had started. Queue the prompt again."
            )

    def begin(self, call: Call) -> None:
        """From now on this call is under way. Raises as ``check_ready``."""
        with self._lock:
            self.check_ready()
            self.now = State.BUSY
            self._calls.append(call)

    def check_ready(self) -> None:
        """Raise unless the group takes a request now.

        Raises:
            GroupLostError: the group has failed before.
            GroupClosedError: it was closed, or never started.
        """
        is_up = self.now in (State.READY, State.BUSY)
        if self.now is State.FAILED or (is_up and self._is_failing()):
            raise failures.lost(self.error)
        if not is_up or self.close_asked:
            raise GroupClosedError(
                "The process group has been closed, or was never started. Queue the prompt again."
            )

    def end_call(self) -> None:
        """Every rank has answered the first of the calls, and begins the next one."""
        with self._lock:
            self._calls.popleft()
            if self._calls:
                self._calls[0].begin()
            else:
                self.now = State.READY

    def ask_to_close(self) -> bool:
        """From here on no request is taken. Returns whether the ranks were ever to be started."""
        with self._lock:
            self.close_asked = True
            return self._is_begun

    def end(self, final: State, error: TPRuntimeError | None) -> list[Call] | None:
        """The group ends now. Returns the calls that are to be told; None: it had ended."""
        with self._lock:
            if self.is_final:
                return None
            # A copy: what is raised keeps the frames that it goes through, and so the models that
            # were to be used, for as long as it is kept.
            self.error = copy.copy(error)
            self.now = final
            calls, self._calls = self._calls, deque()
            return list(calls)
