"""What a plan makes of a model file, without building or reading it: layers, shapes, sizes.

Imports diffusers for the module tree, but no vLLM: nothing here needs a process group.
"""

import math
from dataclasses import dataclass

import torch

from ..recognise import CheckpointInfo
from ..sharding.parts import Layer, Part, Sharding, whole_parts


@dataclass(frozen=True)
class RankShare:
    """Elements of a model that a rank holds (padding included) and reads from the file."""

    held: int
    read: int


def model_footprint(info: CheckpointInfo, tp_size: int) -> tuple[list[Layer], list[RankShare]]:
    """The layers that the family's plan makes of the file's model, and each rank's share.

    Raises:
        PlanError: the plan does not fit the module.
    """
    with torch.device("meta"):
        model = info.family.forward().build(info.sizes)
    table = info.sizes.table
    sharding = Sharding.of(model, table.plan)
    whole = [part for name in sharding.whole for part in whole_parts(name, table.sources)]
    held = sum(_elements(part, info) for part in whole)
    held += sum(_held(layer, tp_size) for layer in sharding.layers)
    held += sum(split.local(tp_size) for split in sharding.vectors.values())
    shares = []
    for rank in range(tp_size):
        parts = sharding.parts(rank, tp_size, table.sources)
        shares.append(RankShare(held, sum(_elements(part, info) for part in parts)))
    return list(sharding.layers), shares


def _held(layer: Layer, tp_size: int) -> int:
    in_features, out_features = layer.local(tp_size)
    return in_features * out_features + layer.bias * out_features


def _elements(part: Part, info: CheckpointInfo) -> int:
    rows = part.rows[1] - part.rows[0]
    if part.columns is not None:
        return rows * (part.columns[1] - part.columns[0])
    return rows * math.prod(info.tensors[part.source].shape[1:])
