"""Which layers the ranks hold as the file has them quantised, and which slices of what they take.

A layer keeps its format if the ranks' cuts fall between the format's groups of columns, and if all
linears that it stands for have that format. Else it is *dequantised*: held in the dtype of plain
weights, nearer to the numbers before quantisation, never further. Columns that only pad are zeros,
which every rotation and every scale keeps, so padding stays exact.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from ..formats import LayerFormat, QuantisedWeight
from .parts import Layer, Part, Sharding, Sources
from .plan import Plan

Weights = Mapping[str, QuantisedWeight]  # by name in the file


@dataclass(frozen=True)
class Quantisation:
    """``held``: path of a layer → the format it is held in. ``dequantised``: path → why it is not.

    ``weights``: the file's quantised weights.
    """

    held: Mapping[str, LayerFormat]
    dequantised: Mapping[str, str]
    weights: Weights

    @classmethod
    def of(
        cls, layers: Iterable[Layer], sources: Sources, weights: Weights, tp_size: int
    ) -> "Quantisation":
        """What becomes of a model's layers on so many ranks."""
        held: dict[str, LayerFormat] = {}
        dequantised: dict[str, str] = {}
        for layer in layers:
            stored = stored_weights(layer, sources)
            found = [weights.get(name) for name in stored]
            if not any(found):
                continue
            why = _obstacle(layer, found, tp_size)
            first = next(weight.format for weight in found if weight is not None)
            if why is None:
                held[layer.path] = first
            else:
                dequantised[layer.path] = why
        return cls(held, dequantised, weights)

    def parts(self, sharding: Sharding, rank: int, tp_size: int, sources: Sources) -> list[Part]:
        """Every slice of the file that ``rank`` holds, in units of what the file stores."""
        found: list[Part] = []
        layers = {layer.path: layer for layer in sharding.layers}
        companions: dict[tuple[str, int], Part] = {}  # several parts may need the same
        for part in sharding.parts(rank, tp_size, sources):
            path, _, kind = part.target.rpartition(".")
            if kind != "weight" or path not in self.held:
                found.append(part)
                continue
            found.append(_in_units(part, self.held[path].storage.packed))
            for name, stored in self.weights[part.source].tensors.items():
                one = _companion(layers[path], self.held[path], part, name, stored, tp_size)
                companions[one.target, one.target_start] = one
        return [*found, *companions.values()]


def sharded(
    model: nn.Module, plan: Plan, sources: Sources, weights: Weights, tp_size: int
) -> tuple[Sharding, Quantisation]:
    """What a plan makes of a module whose file has these quantised weights.

    Hidden widths are dealt out in whole groups of the layers that end them.

    Raises:
        PlanError: the plan does not fit the module.
    """
    sharding = Sharding.of(model, plan)
    groups = {
        weights[name].format.group
        for layer in sharding.layers
        if layer.axis == 1
        for name in stored_weights(layer, sources)
        if name in weights
    }
    group = math.lcm(*groups)
    if group > 1:
        sharding = Sharding.of(model, plan.in_groups_of(group))
    return sharding, Quantisation.of(sharding.layers, sources, weights, tp_size)


def stored_weights(layer: Layer, sources: Sources) -> list[str]:
    """The names in the file of what the layer's weight is made of."""
    names = [source.name for path in layer.replaced for source in sources(f"{path}.weight")]
    return list(dict.fromkeys(names))


def _obstacle(layer: Layer, found: list[QuantisedWeight | None], tp_size: int) -> str | None:
    """Why a layer of these weights cannot be held as they are."""
    formats = {weight.format if weight is not None else None for weight in found}
    if len(formats) > 1:
        names = sorted("plain" if one is None else one.label for one in formats)
        return f"its linears are stored differently ({', '.join(names)})"
    (layer_format,) = formats
    assert layer_format is not None
    if layer.axis == 1 and not _between_groups(layer, layer_format.group, tp_size):
        return f"its cuts do not fall on groups of {layer_format.group} columns"
    return None


def _between_groups(layer: Layer, group: int, tp_size: int) -> bool:
    for section in layer.sections:
        if section.split.local(tp_size) % group:
            return False
        for rank in range(tp_size):
            start, stop = section.split.range(rank, tp_size)
            if stop > start and ((section.first + start) % group or (section.first + stop) % group):
                return False
    return True


def _in_units(part: Part, columns: int) -> Part:
    """The part in units of so many columns."""
    if part.columns is None:
        return part
    start, stop = part.columns
    return dataclasses.replace(
        part,
        target_start=part.target_start // columns,
        columns=(start // columns, stop // columns),
    )


def _companion(
    layer: Layer, layer_format: LayerFormat, part: Part, name: str, stored: str, tp_size: int
) -> Part:
    """What a rank that holds ``part`` of the weight needs of a companion of it."""
    target = f"{layer.path}.{name}"
    by_column = part.columns is not None
    if name == "block_scale":
        blocks = _in_units(part, layer_format.block)
        return dataclasses.replace(blocks, target=target, source=stored)
    if name == "weight_scale":
        return Part(target, 0, 0 if by_column else part.target_start, stored, part.rows)
    assert name in ("pre_quant_scale", "codebook"), name
    if by_column and name == "pre_quant_scale":
        return dataclasses.replace(part, target=target, source=stored, rows=(0, 1))
    ends = accumulate(section.split.local(tp_size) for section in layer.sections)
    linear = 0 if by_column else sum(end <= part.target_start for end in ends)
    return Part(target, 0, linear, stored, (0, 1))
