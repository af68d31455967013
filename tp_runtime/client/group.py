"""One group over time: the engine that runs it now, if any, and who uses its models."""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import GroupConfig
from ..errors import GroupClosedError, GroupLostError, TPRuntimeError
from ..layouts.link_records import LinkRecords
from . import failures
from .background import in_background
from .call import OnProgress
from .engine import Engine
from .evaluated import Evaluated, do_meanwhile, settle_all
from .group_report import GroupReport, rank_reports
from .group_state import State
from .link import measure_link
from .poll import Poll, acquired
from .residency import Holdable, Residency
from .tensor_sender import Asked, patches_in
from .users import Users

if TYPE_CHECKING:
    from .remote_model import RemoteModel

T = TypeVar("T")


class Group:
    """A configuration, and what runs it now. Thread-safe; starts nothing before it is needed."""

    def __init__(
        self,
        config: GroupConfig,
        neighbours: Callable[[GroupConfig], Sequence["Group"]],
        links: LinkRecords,
    ) -> None:
        """``neighbours``: the other groups that have an engine and share devices with this one.

        ``links``: what is known of how this machine's GPUs are connected.
        """
        self.config = config
        self._links = links
        self.id = hashlib.blake2s(repr(config).encode(), digest_size=4).hexdigest()
        self.step_ms: float | None = None
        self._began = 0.0  # to start
        self._neighbours = neighbours
        self._num_starts = 0
        self._residency: Residency | None = None  # of the present engine
        self._users = Users()
        self._changing = threading.Lock()  # held while a group starts, or what it holds changes
        self._process = os.getpid()

    # --- start and end ---------------------------------------------------------------------------

    @property
    def engine(self) -> Engine | None:
        """The present engine, if any. Its group may have failed."""
        residency = self._residency
        return residency.engine if residency else None

    def start(self, poll: Poll | None = None) -> None:
        """Have the group run, if it does not.

        Raises:
            GroupStartError: see ``RankProcesses.start``.
        """
        with acquired(self._changing, poll):
            self._started(poll)

    def close(self) -> bool:
        """End the group; False if there was none. From any thread, whatever the group does."""
        return self._is_ours and self._replace_by(None)

    @property
    def _is_ours(self) -> bool:
        """Whether this is not a process that was forked from the group's: it must not ask the ranks
        for anything, which have one stream for both.
        """
        return os.getpid() == self._process

    def _alive(self) -> Residency | None:
        """What the present engine holds, if its group is up."""
        residency = self._residency
        return residency if residency and residency.engine.is_up() else None

    def _started(self, poll: Poll | None) -> Residency:
        """What a running engine holds, which is started if there is none.

        Groups on the same devices that no model uses any more end: nobody would end them later.
        """
        for other in self._neighbours(self.config):
            if not other.is_used():
                other.close()
        residency = self._alive()
        if residency is None:
            residency = Residency(
                Engine(self.config), self._users.names, lambda: self._neighbours(self.config)
            )
            self._replace_by(residency)
            self._num_starts += 1
            self._began = time.monotonic()
            residency.engine.start(poll)
            if not measure_link(residency.engine, self._links, poll):
                return self._started(poll)  # a new one, which does not try it again
        return residency

    def _replace_by(self, residency: Residency | None) -> bool:
        """Make this the present engine, or have none; end the engine that was there before."""
        old, self._residency = self._residency, residency
        self.step_ms = None
        if old is None:
            return False
        had_processes = old.engine.state not in (State.FAILED, State.CLOSED)
        old.engine.close()
        return had_processes

    # --- using a model ---------------------------------------------------------------------------

    def use(
        self, model: "RemoteModel", poll: Poll | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """Have the model's weights on the devices, patched as it says; start what it needs.

        If the group fails before a request of this could be sent, whoever's request it failed
        of, all of it is done on a new group, once.

        Raises:
            GroupStartError, CheckpointError, and what ``Engine.call`` raises.
        """

        def attempt() -> None:
            with acquired(self._changing, poll):
                self._started(poll).have(model, poll, on_progress)
                model.used_at_start = self._num_starts

        _again_if_lost(attempt)

    def evaluate(
        self, model: "RemoteModel", asked: Sequence[Asked], poll: Poll | None = None
    ) -> Evaluated:
        """Evaluate a model; see ``Engine.evaluate``. What has changed since ``use`` is made good.

        Before, what this thread has asked for ahead is settled, but for the last of it; while the
        ranks compute, it does what it has left for ``meanwhile``.

        If the group has failed before the request could be sent, whoever's request it failed of,
        that is done on a new group: once after each ``use``, so not again and again in a sampling.

        Raises:
            GroupClosedError: the group was released, or never started.
        """
        settle_all(poll, but=1)
        evaluated = _again_if_lost(lambda: self._evaluate(model, asked, poll))
        evaluated.when_settled(lambda: self._note_time(evaluated))
        do_meanwhile()
        return evaluated

    def _note_time(self, evaluated: Evaluated) -> None:
        self.step_ms = 1000 * evaluated.seconds

    def _evaluate(
        self, model: "RemoteModel", asked: Sequence[Asked], poll: Poll | None
    ) -> Evaluated:
        with contextlib.ExitStack() as unchanged:
            unchanged.enter_context(acquired(self._changing, poll))
            present = self.engine
            residency = self._alive()
            if residency is None:
                settle_all(poll)  # raises what it has failed of, if that is this thread's
            if present is None:
                raise GroupClosedError(
                    "No process group runs: it was released since the model was loaded, or the "
                    "model never was. Queue the prompt again."
                )
            if residency is None:
                if self._num_starts > model.used_at_start:
                    raise failures.lost(present.error)
                residency = self._started(poll)
            residency.have(model, poll, model_patches=self._users.named(patches_in(asked)))
            # Until the request is sent, nobody may put the model to sleep or patch it otherwise.
            return residency.engine.evaluate(model.name, asked, poll, on_sent=unchanged.close)

    # --- room on the devices ---------------------------------------------------------------------

    def bytes_on_devices(self, name: str) -> list[int]:
        """Bytes that the model takes on the device of each rank now; 0 if unknown or asleep."""
        alive = self._alive()
        return alive.bytes_on_devices(name) if alive else [0] * self.config.num_ranks

    def sleep(self, name: str, poll: Poll | None = None) -> None:
        """Free the devices of a model; nothing happens if it is not there.

        Waits for the request that is under way. A group that ends meanwhile is fine.
        """
        with acquired(self._changing, poll), contextlib.suppress(TPRuntimeError):
            if alive := self._alive():
                alive.sleep(name, poll)

    def sleep_all(self) -> None:
        """Free the devices of every model."""
        residency = self._residency
        for name in residency.names() if residency else ():
            self.sleep(name)

    def wake(self) -> None:
        """Have the model that was used last on the devices again."""
        with self._changing:
            if alive := self._alive():
                alive.wake_last_used(None)

    def give_way(self, poll: Poll | None = None) -> None:
        """Free the devices of every model, because another group needs the room.

        Not while this group is changing: it may be waiting for that other one to give way.
        """
        if not self._changing.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(TPRuntimeError):  # a group that ends meanwhile is fine
                if alive := self._alive():
                    alive.free_devices(poll)
        finally:
            self._changing.release()

    # --- users -----------------------------------------------------------------------------------

    def add_user(self, model: Holdable) -> None:
        """Keep its shards, once loaded, for as long as ``model`` (or model patch) is there."""
        self._users.add(model, self._on_user_gone)

    def is_used(self) -> bool:
        """Whether somebody holds a model that runs here."""
        return bool(self._users)

    def has_failed(self) -> bool:
        """Whether the present engine's group has ended by a fault."""
        engine = self.engine
        return engine is not None and engine.state is State.FAILED

    def _on_user_gone(self) -> None:
        # In a thread: the garbage collector may come while this one waits for the group.
        if self._is_ours and self._alive():
            in_background(self._unload_unused)

    def _unload_unused(self) -> None:
        with acquired(self._changing, None), contextlib.suppress(TPRuntimeError):
            if alive := self._alive():
                alive.unload_unused(None)

    # --- reports ---------------------------------------------------------------------------------

    def report(
        self, ask_ranks: bool = True, digests: bool = False, poll: Poll | None = None
    ) -> GroupReport:
        """What the group is and holds; ``ask_ranks`` waits for the request that is under way."""
        residency = self._residency
        engine = residency.engine if residency else None
        ranks: list[dict[str, Any]] = []
        error = str(engine.error) if engine and engine.error else None
        is_starting = engine is not None and engine.state is State.STARTING
        if ask_ranks and engine is not None and engine.is_up():
            try:
                ranks = rank_reports(engine, digests, poll)
            except TPRuntimeError as failure:
                error = str(failure)
        return GroupReport(
            id=self.id,
            state=engine.state.value if engine else State.CLOSED.value,
            tp_size=self.config.tp_size,
            batch_groups=self.config.batch_groups,
            sequence_size=self.config.sequence_size,
            device=self.config.device,
            devices=self.config.devices,
            python=self.config.python,
            error=error,
            models=residency.report() if residency else {},
            step_ms=self.step_ms,
            log_tail=engine.processes.log_tail() if engine else "",
            ready_ranks=engine.processes.num_ready if engine else 0,
            starting_s=round(time.monotonic() - self._began, 1) if is_starting else 0.0,
            ranks=ranks,
        )


def _again_if_lost(attempt: Callable[[], T]) -> T:
    """Once more, if the group had failed before a request of the attempt could be sent."""
    try:
        return attempt()
    except GroupLostError:
        return attempt()
