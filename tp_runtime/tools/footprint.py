"""What a plan makes of a model file, without building or reading it: layers, shapes, sizes.

Imports diffusers for the module tree, but no vLLM: nothing here needs a process group.
"""

import math
from dataclasses import dataclass

import torch

from ..models import family
from ..models.recognise import CheckpointInfo
from ..sharding.parts import Layer, Part, layer_parts, plan_layers, whole_parameters, whole_parts


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
    module = family(info.family)
    with torch.device("meta"):
        model = module.build(info.config)
    layers = plan_layers(model, module.plan(info.config))
    sources = module.sources(info.config)
    parts = [p for name in whole_parameters(model, layers) for p in whole_parts(name, sources)]
    whole = sum(_elements(part, info) for part in parts)
    held = whole + sum(_held(layer, tp_size) for layer in layers)
    shares = []
    for rank in range(tp_size):
        split = [part for layer in layers for part in layer_parts(layer, rank, tp_size, sources)]
        shares.append(RankShare(held, whole + sum(_elements(part, info) for part in split)))
    return layers, shares


def _held(layer: Layer, tp_size: int) -> int:
    in_features, out_features = layer.local(tp_size)
    return in_features * out_features + layer.bias * out_features


def _elements(part: Part, info: CheckpointInfo) -> int:
    rows = part.rows[1] - part.rows[0]
    if part.columns is not None:
        return rows * (part.columns[1] - part.columns[0])
    return rows * math.prod(info.tensors[part.source].shape[1:])
