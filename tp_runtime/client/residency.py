"""Where the models of one engine are: on its devices, in the host's memory, or nowhere.

A model is awake (its shards are on the devices) or asleep (in the host's memory). Models go to
sleep, least recently used first, when another one needs their room on the devices; and are freed
when there is no room for them in the host's memory, or nobody holds them any more.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import machine
from ..config import ROOM_BYTES, ROOM_FACTOR, host_reserve
from ..errors import CheckpointError, InputError, SizeError
from ..wire.protocol import PatchedWeight, Report, Wake
from .call import OnProgress
from .engine import Engine
from .poll import Poll


class Holdable(Protocol):
    """What the ranks can hold: a ``RemoteModel`` or a ``RemotePatch``."""

    name: str
    label: str  # for a person
    version: Hashable
    patches: Mapping[str, PatchedWeight]

    def planned_bytes(self) -> int:
        """Bytes that it will take on each rank's device."""
        ...

    def planned_streaming(self) -> int:
        """Bytes that will stay in the host's memory for each rank."""
        ...

    def bytes_of(self, weights: Iterable[str]) -> int:
        """Bytes of these weights of ``patches``, as all ranks of a batch group hold them."""
        ...

    def load(
        self, engine: Engine, poll: Poll | None, on_progress: OnProgress | None
    ) -> tuple[list[int], list[int]]:
        """Have the ranks hold it; the bytes that it takes on each, and with each one's host."""
        ...


_GIB = 2**30
_UNKNOWN = object()


class Neighbour(Protocol):
    """Another group on some of the same devices."""

    def give_way(self, poll: Poll | None = None) -> None:
        """Free the devices of its models, unless it is changing now."""
        ...


@dataclass
class _Resident:
    """A model that the ranks hold.

    ``rank_bytes``: of its shards on each rank's device; None while it is being loaded, and if the
    caller gave up waiting for that: then ``planned`` are those of each. ``streamed_bytes``: those
    that are with the host. ``version``:
    of the patches that it has; ``_UNKNOWN`` while it gets others, and if the caller gave up waiting
    for them, or the ranks refused them. ``backed_up``: the weights that patches have changed, which
    the ranks keep as they were before, until there are no patches.
    """

    planned: int
    rank_bytes: list[int] | None = None
    streamed_bytes: list[int] | None = None
    asleep: bool = False
    version: Hashable = None
    backed_up: set[str] = field(default_factory=set)

    def on_device(self, rank: int) -> int:
        """Bytes of its shard, which take room on the rank's device or with its host."""
        return self.planned if self.rank_bytes is None else self.rank_bytes[rank]


class Residency:
    """The models that an engine's ranks hold, each awake or asleep, and how patched.

    What changes that is called by one thread at a time: the one that holds its group's lock. It
    raises as ``Engine.call`` does, and what ``poll`` raises.
    """

    def __init__(
        self,
        engine: Engine,
        users: Callable[[], Collection[str]],
        neighbours: Callable[[], Sequence[Neighbour]],
    ) -> None:
        """``users``: the names of the models that somebody holds a ``RemoteModel`` of.

        ``neighbours``: the groups that are asked for room where this engine's models gave too
        little.
        """
        self.engine = engine
        self._users = users
        self._neighbours = neighbours
        self._on_cpu = engine.config.device == "cpu"
        self._models: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first

    # --- what is known, without asking the ranks --------------------------------------------------

    def report(self) -> dict[str, dict[str, Any]]:
        """Name of each model → ``bytes`` on each rank, ``streamed`` (both None while it loads) and
        ``asleep``.
        """
        return {
            name: {
                "bytes": resident.rank_bytes,
                "streamed": resident.streamed_bytes,
                "asleep": resident.asleep,
            }
            for name, resident in list(self._models.items())
        }

    def bytes_on_devices(self, name: str) -> list[int]:
        """Bytes that the model takes on the device of each rank; 0 if unknown or asleep."""
        resident = self._models.get(name)
        if resident is None or resident.rank_bytes is None or resident.asleep:
            return [0] * self.engine.config.num_ranks
        return resident.rank_bytes

    # --- one model --------------------------------------------------------------------------------

    def have(
        self,
        model: Holdable,
        poll: Poll | None,
        on_progress: OnProgress | None = None,
        model_patches: Sequence[Holdable] = (),
    ) -> None:
        """Have the ranks hold the model, awake and patched, and these model patches beside it.

        Sends nothing if they do.

        Raises:
            CheckpointError: the ranks refuse the file.
            SizeError: what does not fit on the devices has no room in the host's memory, or too
                little of it can be there.
        """
        together = [*model_patches, model]
        names = {one.name for one in together}
        for one in together:
            self._have(one, names, poll, on_progress)

    def _have(
        self,
        model: Holdable,
        together: Collection[str],
        poll: Poll | None,
        on_progress: OnProgress | None,
    ) -> None:
        models = self._models
        resident = models.get(model.name)
        if resident is None or resident.rank_bytes is None:
            self.unload_unused(poll)
            if resident is None or not self._is_held(model.name, poll):
                self._make_room(together, model.planned_bytes(), poll)
                self._make_room_on_host(model, together, poll)
            resident = models.setdefault(model.name, _Resident(model.planned_bytes()))
            try:
                held = model.load(self.engine, poll, on_progress)
            except (CheckpointError, SizeError):
                del models[model.name]
                raise
            resident.rank_bytes, resident.streamed_bytes = held
        models.move_to_end(model.name)
        self._wake(model.name, resident, poll, together)
        self._patch(model, resident, together, poll)

    def sleep(self, name: str, poll: Poll | None, together: Collection[str] = ()) -> None:
        """Move a model to the host's memory, or free it; nothing happens if it is not there.

        None of those ``together`` is freed for it.
        """
        resident = self._models.get(name)
        if resident is None or resident.asleep:
            return
        needed = sum(map(resident.on_device, range(self.engine.config.parts_on_host)))
        if not self._host_has_room(needed, together, poll):
            self._unload(name, poll)
            return

        def on_sent() -> None:
            resident.asleep = True

        try:
            self.engine.sleep(name, poll, on_sent)
        except InputError:  # its load, which nobody waited for, was refused
            del self._models[name]

    def _wake(
        self,
        name: str,
        resident: _Resident,
        poll: Poll | None,
        together: Collection[str] = (),
    ) -> None:
        if resident.asleep:
            ranks = range(self.engine.config.num_ranks)
            self._make_room({name, *together}, max(map(resident.on_device, ranks)), poll)

            def on_sent() -> None:
                resident.asleep = False

            self.engine.call(lambda call: Wake(call, name), poll=poll, on_sent=on_sent)

    def _patch(
        self, model: Holdable, resident: _Resident, together: Collection[str], poll: Poll | None
    ) -> None:
        version = model.version
        if resident.version != version:
            self._make_room_for_backup(model, resident, together, poll)

            def on_sent() -> None:
                resident.version = _UNKNOWN
                resident.backed_up |= model.patches.keys()

            self.engine.patch(model.name, model.patches, poll, on_sent)
            resident.version = version
            if not model.patches:
                resident.backed_up.clear()

    def _is_held(self, name: str, poll: Poll | None) -> bool:
        """Whether the ranks have loaded a model whose load the caller gave up waiting for."""
        return all(name in value["models"] for value in self.engine.call(Report, poll=poll))

    def _unload(self, name: str, poll: Poll | None) -> None:
        self.engine.unload(name, poll, on_sent=lambda: self._models.pop(name, None))

    # --- all models -------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names of the models that the ranks hold, least recently used first."""
        return list(self._models)

    def wake_last_used(self, poll: Poll | None) -> None:
        """Have the model that was used last on the devices again."""
        if self._models:
            name, resident = next(reversed(self._models.items()))
            self._wake(name, resident, poll)

    def free_devices(self, poll: Poll | None) -> None:
        """Have every model leave the devices."""
        for name in self._on_devices():
            self._leave_devices(name, poll)

    def unload_unused(self, poll: Poll | None) -> None:
        """Free the shards of models that nobody holds."""
        for name in self._models.keys() - self._users():
            self._unload(name, poll)

    # --- room -------------------------------------------------------------------------------------

    def _make_room(self, together: Collection[str], needed: int, poll: Poll | None) -> None:
        """Free the devices of models, as far as that helps, until ``needed`` bytes fit.

        But for those that are needed ``together``. First of this engine's, then of those that
        share devices with it.
        """

        def fits() -> bool:
            return self._free_bytes(poll) >= needed * ROOM_FACTOR + ROOM_BYTES

        for other in self._on_devices():
            if other not in together:
                if fits():
                    return
                self._leave_devices(other, poll, together)
        if self.engine.config.ray_address:
            return  # Ray gives a GPU to one group only
        for group in self._neighbours():
            if fits():
                return
            group.give_way(poll)

    def _free_bytes(self, poll: Poll | None) -> int:
        """What is free on the device of the rank that has the least."""
        if self._on_cpu:
            return machine.memory().available // self.engine.config.num_ranks
        return min(value["memory"]["free_bytes"] for value in self.engine.call(Report, poll=poll))

    def _on_devices(self) -> list[str]:
        """The models whose weights take room on the devices, least recently used first."""
        # On CPU ranks, the weights of sleeping models do, too.
        return [n for n, resident in self._models.items() if self._on_cpu or not resident.asleep]

    def _leave_devices(self, name: str, poll: Poll | None, together: Collection[str] = ()) -> None:
        if self._on_cpu:
            self._unload(name, poll)
        else:
            self.sleep(name, poll, together)

    def _make_room_for_backup(
        self, model: Holdable, resident: _Resident, together: Collection[str], poll: Poll | None
    ) -> None:
        """Have the host's memory take the weights that patches change, as they are before, and what
        patches consist of, which each rank has for itself. Raises SizeError.
        """
        config = self.engine.config
        added = model.bytes_of(model.patches.keys() - resident.backed_up)
        weights = added * config.parts_on_host // config.tp_size
        needed = weights + self.engine.bytes_not_held(model.patches) * config.num_ranks
        if not needed or self._host_has_room(needed, together, poll):
            return
        memory = machine.memory()
        if memory.available < needed:  # less of it may be left free than models that sleep leave
            raise SizeError(
                f"The LoRA or other patch of {model.label} takes {needed / _GIB:.2f} GiB of the "
                f"host's memory: the weights that it changes, as they were ({weights / _GIB:.2f} "
                f"GiB), and itself in each of {config.num_ranks} processes. "
                f"{memory.available / _GIB:.2f} GiB are left. Close what takes the memory, use "
                "fewer GPUs or a quantised file, or a file into which the LoRA is merged."
            )

    def _make_room_on_host(
        self, model: Holdable, together: Collection[str], poll: Poll | None
    ) -> None:
        """Have the host's memory take what is streamed of a model; raises SizeError."""
        config, share = self.engine.config, model.planned_streaming()
        needed = share * config.parts_on_host
        if not needed or self._host_has_room(needed, together, poll):
            return
        memory = machine.memory()
        raise SizeError(
            f"A GPU may hold {model.planned_bytes() / _GIB:.2f} GiB of {model.label}'s weights, "
            f"so {share / _GIB:.2f} GiB for each of {config.parts_on_host} parts must stay in the "
            f"host's memory. It has {memory.available / _GIB:.2f} GiB left, of which "
            f"{host_reserve() * memory.total / _GIB:.2f} GiB stay free (TP_RUNTIME_HOST_RESERVE). "
            "Choose more GPUs or a quantised file, or close what takes the memory."
        )

    def _host_has_room(self, needed: int, together: Collection[str], poll: Poll | None) -> bool:
        """Whether the host can take so many bytes; frees models that have slept for it.

        Those that have slept longest first, and none that is needed ``together``.
        """
        if self._on_cpu:
            return True  # the weights are in the host's memory already
        if self.engine.config.where == "ray":
            return True  # nobody knows the memory of the hosts
        reserve = host_reserve() * machine.memory().total
        models = self._models.items()
        for other in [n for n, resident in models if resident.asleep and n not in together]:
            if machine.memory().available - needed >= reserve:
                break
            self._unload(other, poll)
        return machine.memory().available - needed >= reserve
