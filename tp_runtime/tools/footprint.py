"""What a plan makes of a model file, without building or reading it: layers, shapes, sizes.

Imports diffusers for the module tree, but no vLLM: nothing here needs a process group.
"""

import math
from dataclasses import dataclass

import torch

from ..recognise import CheckpointInfo
from ..sharding.parts import Layer, Part, Sharding, whole_parts
from ..sharding.quantisation import Quantisation, sharded

PLAIN_BYTES = 2  # an element of a weight that is not quantised: bf16


@dataclass(frozen=True)
class RankShare:
    """Elements of a model that a rank holds (padding included) and reads from the file.

    ``held_bytes``: with plain weights in bf16.
    """

    held: int
    held_bytes: int
    read: int


@dataclass(frozen=True)
class Footprint:
    """The layers that a family's plan makes of a file's model, and each rank's share."""

    layers: tuple[Layer, ...]
    quantisation: Quantisation
    shares: tuple[RankShare, ...]


def model_footprint(info: CheckpointInfo, tp_size: int) -> Footprint:
    """What a file becomes on so many ranks.

    Raises:
        PlanError: the plan does not fit the module.
    """
    with torch.device("meta"):
        model = info.family.forward().build(info.sizes)
    table = info.sizes.table
    sharding, quantisation = sharded(model, table.plan, table.sources, info.quantised, tp_size)
    whole = [part for name in sharding.whole for part in whole_parts(name, table.sources)]
    others = sum(_elements(part, info) for part in whole)
    others += sum(split.local(tp_size) for split in sharding.vectors.values())
    held = others + sum(_held(layer, tp_size) for layer in sharding.layers)
    held_bytes = PLAIN_BYTES * others
    held_bytes += sum(_held_bytes(layer, quantisation, tp_size) for layer in sharding.layers)
    reads = (_read(sharding, rank, tp_size, info) for rank in range(tp_size))
    shares = tuple(RankShare(held, held_bytes, read) for read in reads)
    return Footprint(sharding.layers, quantisation, shares)


def _read(sharding: Sharding, rank: int, tp_size: int, info: CheckpointInfo) -> int:
    parts = sharding.parts(rank, tp_size, info.sizes.table.sources)
    return sum(_elements(part, info) for part in parts)


def _held(layer: Layer, tp_size: int) -> int:
    in_features, out_features = layer.local(tp_size)
    return in_features * out_features + layer.bias * out_features


def _held_bytes(layer: Layer, quantisation: Quantisation, tp_size: int) -> int:
    in_features, out_features = layer.local(tp_size)
    layer_format = quantisation.held.get(layer.path)
    if layer_format is None:
        return PLAIN_BYTES * _held(layer, tp_size)
    storage = layer_format.storage
    weight = out_features * (in_features // storage.packed) * storage.dtype.itemsize
    linears = len(layer.sections) if layer.axis == 0 else 1
    companions = sum(
        layer_format.companion_shape(name, (out_features, in_features), linears).numel()
        * layer_format.companion_dtype(name).itemsize
        for name in layer_format.companions
    )
    return weight + companions + PLAIN_BYTES * layer.bias * out_features


def _elements(part: Part, info: CheckpointInfo) -> int:
    rows = part.rows[1] - part.rows[0]
    if part.columns is not None:
        return rows * (part.columns[1] - part.columns[0])
    return rows * math.prod(info.tensors[part.source].shape[1:])
