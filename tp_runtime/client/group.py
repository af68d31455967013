"""One group over time: its present engine and the models that it holds. Part of the engine's half.

A model is awake (its shards are on the devices) or asleep (in the host's memory). Models go to
sleep, least recently used first, when another one needs their room on the devices; and are freed
when there is no room for them in the host's memory, or nobody holds them any more.
"""

import contextlib
import hashlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ..config import ROOM_BYTES, ROOM_FACTOR, GroupConfig, host_reserve
from ..errors import CheckpointError, GroupClosedError, GroupLostError, InputError, TPRuntimeError
from ..wire.protocol import Load, Report, Sleep, Wake
from . import failures
from .call import POLL_S, OnProgress
from .engine import Engine
from .launch.launcher import Poll
from .rank_processes import State
from .tensor_sender import Wanted

if TYPE_CHECKING:
    from .remote_model import RemoteModel


@dataclass(frozen=True)
class GroupReport:
    """What a group is and holds. ``ranks``: one mapping each, empty unless it was asked for.

    ``models``: name → ``bytes`` on each rank (None while it loads) and ``asleep``. ``step_ms``:
    how long the last evaluation took, as its caller saw it, up to its result being on the way to
    the caller's device. ``log_tail``: the end of the log of the rank that failed. Of each rank:
    ``rank``, ``tp_world_size`` (as vLLM reports it there), ``device``, ``pid``, ``place`` (its
    process and host, in words), ``mirrored`` (its tensors go by TCP), ``versions``,
    ``memory`` (bytes), ``models`` (bytes resident and read, ...), ``last_evaluation_ms``.
    """

    id: str
    state: str
    tp_size: int
    batch_groups: int
    device: str
    devices: tuple[int, ...]
    python: str
    error: str | None
    models: dict[str, dict[str, Any]]
    step_ms: float | None = None
    log_tail: str = ""
    ranks: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


@dataclass
class _Resident:
    """A model that the ranks hold.

    ``rank_bytes`` is None while that is not known (being loaded, or the wait was given up).
    ``version`` is that of the patches; what was asked for, even if the wait was given up.
    """

    rank_bytes: list[int] | None = None
    asleep: bool = False
    version: Hashable = None


class Group:
    """A configuration, the engine that runs it now, if any, and what that holds."""

    def __init__(
        self, config: GroupConfig, neighbours: Callable[[GroupConfig], Sequence["Group"]]
    ) -> None:
        """``neighbours``: the other groups that have an engine and share devices with this one."""
        self.config = config
        self._neighbours = neighbours
        self.id = hashlib.blake2s(repr(config).encode(), digest_size=4).hexdigest()
        self.engine: Engine | None = None
        self.step_ms: float | None = None
        self._num_starts = 0
        self._models: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._users: weakref.WeakSet[RemoteModel] = weakref.WeakSet()
        self._users_lock = threading.Lock()
        self._changing = threading.Lock()  # held while a group starts, or what it holds changes

    # --- the engine ------------------------------------------------------------------------------

    def alive(self) -> Engine | None:
        """The engine, if its group is up."""
        engine = self.engine
        return engine if engine and engine.is_up() else None

    def start(self, poll: Poll | None = None) -> Engine:
        """The engine of a running group, which is started if there is none.

        Raises:
            GroupStartError: see ``Engine.start``.
        """
        with _acquired(self._changing, poll):
            return self._start(poll)

    def close(self) -> bool:
        """End the group; False if there was none. From any thread, whatever the group does."""
        return self._replace_by(None)

    def _replace_by(self, engine: Engine | None) -> bool:
        """Have another engine, which holds no model yet, or none; end the one of before."""
        old, self.engine = self.engine, engine
        self._models = OrderedDict()
        self.step_ms = None
        if old is None:
            return False
        had_processes = old.state not in (State.FAILED, State.CLOSED)
        old.close()
        return had_processes

    # --- models ----------------------------------------------------------------------------------

    def add_user(self, model: "RemoteModel") -> None:
        """Keep the model's shards, once loaded, for as long as ``model`` is there."""
        with self._users_lock:
            self._users.add(model)
        weakref.finalize(model, self._on_user_gone).atexit = False

    def is_used(self) -> bool:
        """Whether somebody holds a model that runs here."""
        with self._users_lock:
            return bool(self._users)

    def use(
        self, model: "RemoteModel", poll: Poll | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """Have the model's weights on the devices, patched as it wants them; start what it needs.

        If the group fails before a request of this could be sent, whoever's request it failed
        of, all of it is done on a new group, once.

        Raises:
            GroupStartError, CheckpointError, and what ``Engine.call`` raises.
        """
        try:
            self._use(model, poll, on_progress)
        except GroupLostError:
            self._use(model, poll, on_progress)

    def _use(self, model: "RemoteModel", poll: Poll | None, on_progress: OnProgress | None) -> None:
        with _acquired(self._changing, poll):
            self._engine_with(model, poll, on_progress)
            model.used_at_start = self._num_starts

    def evaluate(
        self, model: "RemoteModel", wanted: Sequence[Wanted], poll: Poll | None = None
    ) -> list[torch.Tensor]:
        """Evaluate a model; see ``Engine.evaluate``. What has changed since ``use`` is made good.

        If the group has failed before the request could be sent, whoever's request it failed of,
        that is done on a new group: once after each ``use``, so not again and again in a sampling.

        Raises:
            GroupClosedError: the group was released, or never started.
        """
        try:
            return self._evaluate(model, wanted, poll)
        except GroupLostError:
            return self._evaluate(model, wanted, poll)

    def _evaluate(
        self, model: "RemoteModel", wanted: Sequence[Wanted], poll: Poll | None
    ) -> list[torch.Tensor]:
        with contextlib.ExitStack() as unchanged:
            unchanged.enter_context(_acquired(self._changing, poll))
            if self.engine is None:
                raise GroupClosedError(
                    "No process group runs: it was released since the model was loaded, or the "
                    "model never was. Queue the prompt again."
                )
            if self.alive() is None and self._num_starts > model.used_at_start:
                raise failures.lost(self.engine.error)
            engine = self._engine_with(model, poll)
            started = time.perf_counter()
            # Until the request is sent, nobody may put the model to sleep or patch it otherwise.
            results = engine.evaluate(model.name, wanted, poll, on_sent=unchanged.close)
        self.step_ms = (time.perf_counter() - started) * 1000
        return results

    def bytes_on_devices(self, name: str) -> list[int]:
        """Bytes that the model takes on the device of each rank now; 0 if unknown or asleep."""
        resident = self._models.get(name)
        if resident is None or resident.rank_bytes is None or resident.asleep or not self.alive():
            return [0] * self.config.num_ranks
        return resident.rank_bytes

    def sleep(self, name: str, poll: Poll | None = None) -> None:
        """Free the devices of a model; nothing happens if it is not there.

        Waits for the request that is under way. A group that ends meanwhile is fine.
        """
        with _acquired(self._changing, poll), contextlib.suppress(TPRuntimeError):
            engine = self.alive()
            if engine is not None and name in self._models:
                self._put_to_sleep(engine, name, poll)

    def give_way(self, poll: Poll | None = None) -> None:
        """Free the devices of every model for another group.

        Unless this one is changing now: it may be waiting for the other to do the same.
        """
        if not self._changing.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(TPRuntimeError):  # a group that ends meanwhile is fine
                engine = self.alive()
                if engine is not None:
                    for name in self._on_devices():
                        self._free_devices(engine, name, poll)
        finally:
            self._changing.release()

    def sleep_all(self, poll: Poll | None = None) -> None:
        """Free the devices of every model."""
        for name in list(self._models):
            self.sleep(name, poll)

    def wake(self, poll: Poll | None = None) -> None:
        """Have the model that was used last on the devices again."""
        with _acquired(self._changing, poll):
            engine = self.alive()
            if engine is not None and self._models:
                name, resident = next(reversed(self._models.items()))
                self._wake(engine, name, resident, poll)

    # --- to be called while holding _changing ----------------------------------------------------

    def _start(self, poll: Poll | None) -> Engine:
        engine = self.alive()
        if engine is None:
            for other in self._neighbours(self.config):
                if not other.is_used():
                    other.close()
            engine = Engine(self.config)
            self._replace_by(engine)
            self._num_starts += 1
            engine.start(poll)
        return engine

    def _engine_with(
        self, model: "RemoteModel", poll: Poll | None, on_progress: OnProgress | None = None
    ) -> Engine:
        """An engine whose ranks hold the model, as it is wanted. Sends nothing if they do."""
        engine = self._start(poll)
        models = self._models
        resident = models.get(model.name)
        if resident is None or resident.rank_bytes is None:
            self._free_unused(engine, poll)
            self._make_room(engine, model.name, model.planned_bytes(), poll)
            resident = models.setdefault(model.name, _Resident())
            try:
                values = engine.call(
                    lambda call: Load(call, model.name, model.spec),
                    poll=poll,
                    on_progress=on_progress,
                )
            except CheckpointError:
                del models[model.name]
                raise
            resident.rank_bytes = [value["resident_bytes"] for value in values]
        models.move_to_end(model.name)
        self._be_as_wanted(engine, resident, model, poll)
        return engine

    def _be_as_wanted(
        self, engine: Engine, resident: _Resident, model: "RemoteModel", poll: Poll | None
    ) -> None:
        self._wake(engine, model.name, resident, poll)
        version = model.version
        if resident.version != version:

            def on_sent() -> None:
                resident.version = version

            engine.patch(model.name, model.patches, poll, on_sent)

    def _wake(self, engine: Engine, name: str, resident: _Resident, poll: Poll | None) -> None:
        if resident.asleep:
            self._make_room(engine, name, max(resident.rank_bytes or [0]), poll)

            def on_sent() -> None:
                resident.asleep = False

            engine.call(lambda call: Wake(call, name), poll=poll, on_sent=on_sent)

    def _put_to_sleep(self, engine: Engine, name: str, poll: Poll | None) -> None:
        resident = self._models[name]
        if resident.asleep:
            return
        if not self._host_has_room(engine, name, poll):
            self._unload(engine, name, poll)
            return

        def on_sent() -> None:
            resident.asleep = True

        try:
            engine.call(lambda call: Sleep(call, name), poll=poll, on_sent=on_sent)
        except InputError:  # its load, which nobody waited for, was refused
            del self._models[name]

    def _host_has_room(self, engine: Engine, name: str, poll: Poll | None) -> bool:
        """Whether the host can take the model; frees models that have slept longer for it."""
        rank_bytes = self._models[name].rank_bytes
        if self.config.device == "cpu":
            return True  # where it is already
        needed = sum(rank_bytes or [])
        reserve = host_reserve() * psutil.virtual_memory().total
        for other in [n for n, resident in self._models.items() if resident.asleep]:
            if psutil.virtual_memory().available - needed >= reserve:
                break
            self._unload(engine, other, poll)
        return psutil.virtual_memory().available - needed >= reserve

    def _make_room(self, engine: Engine, name: str, needed: int, poll: Poll | None) -> None:
        """Free the devices of other models, as far as that helps, until ``needed`` bytes fit.

        First of this group's, then of those that share devices with it.
        """

        def fits() -> bool:
            return self._free_bytes(engine, poll) >= needed * ROOM_FACTOR + ROOM_BYTES

        for other in self._on_devices():
            if other != name:
                if fits():
                    return
                self._free_devices(engine, other, poll)
        if self.config.ray_address:
            return  # Ray gives a GPU to one group only
        for group in self._neighbours(self.config):
            if fits():
                return
            group.give_way(poll)

    def _on_devices(self) -> list[str]:
        """The models whose weights take room on the devices, least recently used first."""
        on_cpu = self.config.device == "cpu"  # where sleeping ones do, too
        return [name for name, resident in self._models.items() if on_cpu or not resident.asleep]

    def _free_devices(self, engine: Engine, name: str, poll: Poll | None) -> None:
        if self.config.device == "cpu":
            self._unload(engine, name, poll)
        else:
            self._put_to_sleep(engine, name, poll)

    def _free_bytes(self, engine: Engine, poll: Poll | None) -> int:
        """What is free on the device of the rank that has the least."""
        if self.config.device == "cpu":
            return psutil.virtual_memory().available // self.config.num_ranks
        return min(value["memory"]["free_bytes"] for value in engine.call(Report, poll=poll))

    def _unload(self, engine: Engine, name: str, poll: Poll | None) -> None:
        models = self._models
        engine.unload(name, poll, on_sent=lambda: models.pop(name, None))

    def _free_unused(self, engine: Engine, poll: Poll | None) -> None:
        """Free the shards of models that nobody holds."""
        with self._users_lock:
            wanted = {model.name for model in self._users}
        for name in self._models.keys() - wanted:
            self._unload(engine, name, poll)

    def _on_user_gone(self) -> None:
        # In a thread: the garbage collector may come while this one waits for the group.
        if self.alive():
            threading.Thread(target=self._free_in_background, daemon=True).start()

    def _free_in_background(self) -> None:
        with _acquired(self._changing, None), contextlib.suppress(TPRuntimeError):
            engine = self.alive()
            if engine is not None:
                self._free_unused(engine, None)

    # --- reports ---------------------------------------------------------------------------------

    def report(
        self, ask_ranks: bool = True, digests: bool = False, poll: Poll | None = None
    ) -> GroupReport:
        """What the group is and holds; ``ask_ranks`` waits for the request that is under way."""
        engine = self.engine
        ranks: list[dict[str, Any]] = []
        error = str(engine.error) if engine and engine.error else None
        if ask_ranks and engine is not None and self.alive():
            try:
                values = engine.call(lambda call: Report(call, digests), poll=poll)
            except TPRuntimeError as failure:
                error = str(failure)
            else:
                ranks = [
                    {
                        "rank": ready.rank,
                        "tp_world_size": ready.tp_world_size,
                        "pid": rank.pid,
                        "place": rank.place,
                        "mirrored": rank.mirrored,
                        "versions": ready.versions,
                        **value,
                    }
                    for ready, rank, value in zip(engine.ready, engine.ranks, values, strict=True)
                ]
        return GroupReport(
            id=self.id,
            state=engine.state.value if engine else State.CLOSED.value,
            tp_size=self.config.tp_size,
            batch_groups=self.config.batch_groups,
            device=self.config.device,
            devices=self.config.devices,
            python=self.config.python,
            error=error,
            models={
                name: {"bytes": resident.rank_bytes, "asleep": resident.asleep}
                for name, resident in list(self._models.items())
            },
            step_ms=self.step_ms,
            log_tail=engine.log_tail() if engine else "",
            ranks=ranks,
        )


@contextlib.contextmanager
def _acquired(lock: threading.Lock, poll: Poll | None) -> Iterator[None]:
    """Hold the lock; ``poll`` is called while waiting for it."""
    while not lock.acquire(timeout=POLL_S):
        if poll is not None:
            poll()
    try:
        yield
    finally:
        lock.release()
