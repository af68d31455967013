"""The weights of a rank's shard that patches have changed, and how they were before.

A patched weight is computed whole on every rank, as ComfyUI computes it, and each rank keeps its
slices: norms over rows, rotations of rows and the random numbers of fp8's rounding are then those
of the whole weight. The ranks put it together from their shards, so nothing is read from the file.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from ..formats import QuantisedWeight
from ..sharding.parts import Part
from ..wire.protocol import PatchedWeight, TensorRef, WeightPatch
from ..wire.weight_patches import patched, rounded
from .host_copy import HostCopy, PartMemory
from .quantised_arithmetic import dequantised
from .requantising import check_requantising, requantised

# Puts the ranks' equally long vectors one after another: (n,) on each rank → (n · tp_size,).
Gather = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StoredWeight:
    """How a shard holds a tensor of the file.

    ``shape`` is the whole tensor's, in units of the parameter; ``dtype`` what its values are
    rounded to, which the parameter may exceed. ``quantised``: how, if it is held so.
    ``input_scale`` (columns,): what the file's values were multiplied by, of a weight that is held
    dequantised and whose linear scales its input. A patch is of the values before that.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    quantised: QuantisedWeight | None = None
    input_scale: torch.Tensor | None = None


class PatchedWeights:
    """Changes weights in place, and back: a captured graph that reads them stays valid.

    A weight that patches make larger has a place for each shape, to which its parameter is moved: a
    graph was captured with latents of as many channels, and reads the place of that shape.

    ``parts_of(rank)``: the slices that a rank holds, and their places. ``device``: where new
    weights are computed; the places of streamed layers are with the host. How the own slices were
    before is kept in the host's memory for as long as any weight is patched. ``part_memory``: in
    that of all ranks that hold the same, if there are others; there the parameters ``in_host`` lie,
    too, which one rank writes for all.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: Mapping[str, StoredWeight],
        parts_of: Callable[[int], list[Part]],
        rank: int,
        tp_size: int,
        gather: Gather,
        device: torch.device,
        part_memory: PartMemory | None = None,
        in_host: Collection[str] = (),
    ) -> None:
        self._part_memory = part_memory
        self._in_host = in_host if part_memory is not None else ()
        self._parameters = dict(model.named_parameters())
        self._stored = stored
        self._parts_of = parts_of
        self._rank = rank
        self._tp_size = tp_size
        self._gather = gather
        self._device = device
        self._applied: dict[str, PatchedWeight] = {}
        self._before: dict[str, list[torch.Tensor]] = {}
        self._copies: list[HostCopy] = []
        # Of parameters that are larger than in the file: their shape there, and the places of the
        # shapes that they have had.
        self._shape_in_file: dict[str, torch.Size] = {}
        self._places_by_shape: dict[str, dict[torch.Size, torch.Tensor]] = {}

    def __len__(self) -> int:
        """How many weights are patched."""
        return len(self._applied)

    def check(self, wanted: Mapping[str, PatchedWeight]) -> None:
        """Look at what ``apply`` is going to be given; afterwards it must not be refused.

        Raises:
            CheckpointError: a weight is quantised in a way that cannot be done again here.
        """
        for name in wanted:
            quantised = self._stored[name].quantised if name in self._parts else None
            if quantised is not None:
                check_requantising(quantised.format)

    def apply(self, wanted: Mapping[str, PatchedWeight], held: Mapping[int, torch.Tensor]) -> None:
        """Make the weights those of the file, but for the changes of ``wanted``.

        ``wanted``: name in the file → changes, whose factors refer to tensors of ``held``. What is
        patched in that way already is left alone. Every rank has to be told the same.
        """
        wanted = {name: change for name, change in wanted.items() if name in self._parts}
        changed = [name for name, change in wanted.items() if self._applied.get(name) != change]
        self._meet()  # others may still compute with the weights that were
        for name in self._applied:
            if name in changed or name not in wanted:
                self._restore(name)
        self._meet()
        self._back_up([name for name in changed if name not in self._before])
        for name in changed:
            self._patch(name, wanted[name], held)
        self._meet()
        self._applied = wanted
        if not wanted:
            self.close()

    def close(self) -> None:
        """Give back the host's memory. What is patched stays so."""
        self._before.clear()
        for copy in self._copies:
            copy.close()
        self._copies.clear()

    def drop_other_shapes(self) -> None:
        """Give back the places of shapes that no weight has now. No graph reads them any more."""
        self._places_by_shape.clear()

    def _patch(self, name: str, change: PatchedWeight, held: Mapping[int, torch.Tensor]) -> None:
        stored = self._stored[name]
        names = self._tensors_of(name)
        if stored.quantised is None:
            values = self._whole(name)
            for stage in change.stages:
                values = values.to(torch.float32, copy=True)
                values = _patched_before(stored.input_scale, values, stage, held)
                values = rounded(values, stored.dtype, change.seed, change.by_bytes)
            self._meet(name)
            self._write(name, values)
            return
        tensors = {kind: self._whole(stored_name) for kind, stored_name in names.items()}
        for stage in change.stages:
            values = dequantised(stored.quantised.format, tensors, torch.float32)
            values = _patched(values, stage, held)
            tensors = requantised(stored.quantised, values, tensors, change)
        self._meet(*names.values())
        for kind, stored_name in names.items():
            self._write(stored_name, tensors[kind])

    def _tensors_of(self, name: str) -> dict[str, str]:
        """A weight and its companions: kind of the parameter → name in the file."""
        quantised = self._stored[name].quantised
        return {"weight": name, **(quantised.tensors if quantised is not None else {})}

    def _write(self, name: str, values: torch.Tensor) -> None:
        """Take the own slices of all of a stored tensor."""
        if values.shape != self._stored[name].shape:
            (part,) = self._parts[name][self._rank]  # such a weight is whole on every rank
            parameter = self._parameters[part.target]
            self._shape_in_file[part.target] = parameter.shape
            self._move(part.target, values.shape)
            parameter.data.copy_(values)
            return
        for part, place in self._places(name):
            if self._writes(part):
                place.copy_(_slice(values, part))

    def _move(self, target: str, shape: torch.Size) -> None:
        """Have a parameter lie in its place for that shape, with whatever values that has."""
        parameter = self._parameters[target]
        places = self._places_by_shape.setdefault(target, {})
        places[parameter.shape] = parameter.data
        if shape not in places:
            places[shape] = parameter.data.new_empty(shape)
        parameter.data = places[shape]

    def _writes(self, part: Part) -> bool:
        """Whether this rank writes there, and not another one for all."""
        return (
            self._part_memory is None or self._part_memory.leads or part.target not in self._in_host
        )

    def _meet(self, *names: str) -> None:
        """Wait for all ranks, where one writes what others read; ``names``: only if it is in these.

        Whether it is, is the same on every rank.
        """
        if self._part_memory is None or not self._in_host:
            return
        targets = {part.target for name in names for parts in self._parts[name] for part in parts}
        if not names or not targets.isdisjoint(self._in_host):
            self._part_memory.meet()

    # --- before ----------------------------------------------------------------------------------

    def _back_up(self, names: list[str]) -> None:
        slices = {
            f"{name} {index}": tensor
            for name in names
            for index, tensor in enumerate(self._slices(name))
        }
        copy = HostCopy(slices, self._part_memory)
        self._copies.append(copy)
        for name in names:
            count = len(self._slices(name))
            self._before[name] = [copy.tensors[f"{name} {index}"] for index in range(count)]

    def _restore(self, name: str) -> None:
        for stored_name in self._tensors_of(name).values():
            for part in self._parts[stored_name][self._rank]:
                if part.target in self._shape_in_file:
                    self._move(part.target, self._shape_in_file.pop(part.target))
        names_of = self._tensors_of(name).values()
        places = [place for stored_name in names_of for place in self._places(stored_name)]
        for (part, tensor), before in zip(places, self._before[name], strict=True):
            if self._writes(part):
                tensor.copy_(before, non_blocking=True)

    # --- where a stored tensor's values are ------------------------------------------------------

    @functools.cached_property
    def _parts(self) -> dict[str, list[list[Part]]]:
        """Name in the file → the parts of it that each rank holds."""
        parts: dict[str, list[list[Part]]] = {}
        for rank in range(self._tp_size):
            for part in self._parts_of(rank):
                parts.setdefault(part.source, [[] for _ in range(self._tp_size)])[rank].append(part)
        return parts

    def _places(self, name: str) -> Iterator[tuple[Part, torch.Tensor]]:
        for part in self._parts[name][self._rank]:
            parameter = self._parameters[part.target].data
            yield part, parameter.narrow(part.axis, part.target_start, part.length)

    def _slices(self, name: str) -> list[torch.Tensor]:
        """The own slices of a weight and its companions."""
        names = self._tensors_of(name).values()
        return [place for stored_name in names for _, place in self._places(stored_name)]

    def _whole(self, name: str) -> torch.Tensor:
        """All of a stored tensor, as the shards hold it, put together from every rank's."""
        shape = self._stored[name].shape
        of_ranks = self._parts[name]
        sizes = [sum(math.prod(_shape(part, shape)) for part in parts) for parts in of_ranks]
        mine = [place for _, place in self._places(name)]
        target = next(part.target for parts in of_ranks for part in parts)
        dtype = self._parameters[target].dtype
        whole = torch.empty(shape, dtype=dtype, device=self._device)
        vector = torch.empty(max(sizes), dtype=dtype, device=self._device)
        start = 0
        for place in mine:
            vector[start : start + place.numel()].copy_(place.flatten())
            start += place.numel()
        if min(sizes) == whole.numel():  # everybody has all of it
            _fill(whole, of_ranks[self._rank], vector)
            return whole
        gathered = self._gather(vector.view(torch.uint8)).view(self._tp_size, -1)
        for parts, values in zip(of_ranks, gathered.unbind(), strict=True):
            _fill(whole, parts, values.view(dtype))
        return whole


def _fill(whole: torch.Tensor, parts: list[Part], values: torch.Tensor) -> None:
    """Put the parts of a rank, which lie in ``values`` one after another, to their places."""
    start = 0
    for part in parts:
        place = _slice(whole, part)
        place.copy_(values[start : start + place.numel()].view(place.shape))
        start += place.numel()


def _patched(
    weight: torch.Tensor, stage: tuple[WeightPatch, ...], held: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    return patched(weight, [_with_factors(patch, held) for patch in stage])


def _patched_before(
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    stage: tuple[WeightPatch, ...],
    held: Mapping[int, torch.Tensor],
) -> torch.Tensor:
    """The same for a weight (rows, columns) that was multiplied by ``scale`` (columns,)."""
    if scale is None:
        return _patched(weight, stage, held)
    scale = scale.to(weight.device)
    before = torch.where(scale == 0, 0.0, weight / scale)
    return _patched(before, stage, held) * scale


def _slice(whole: torch.Tensor, part: Part) -> torch.Tensor:
    rows = whole[slice(*part.rows)]
    return rows if part.columns is None else rows[:, slice(*part.columns)]


def _shape(part: Part, whole: tuple[int, ...]) -> tuple[int, ...]:
    rows = part.rows[1] - part.rows[0]
    if part.columns is None:
        return (rows, *whole[1:])
    return (rows, part.columns[1] - part.columns[0])


def _with_factors(patch: WeightPatch, held: Mapping[int, torch.Tensor]) -> WeightPatch:
    """The patch with tensors in the place of references."""
    factors = tuple(
        held[factor.key] if isinstance(factor, TensorRef) else factor for factor in patch.factors
    )
    return msgspec.structs.replace(patch, factors=factors)
