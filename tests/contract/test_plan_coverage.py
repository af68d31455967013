"""Each family's plan, file table and sources fit together, at the published models' sizes."""

import functools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from bench.dummy import config_of
from tp_runtime.models import FAMILIES, family
from tp_runtime.sharding.parts import (
    Layer,
    Part,
    Source,
    layer_parts,
    plan_layers,
    whole_parameters,
    whole_parts,
)

MAX_BYTES = 1.05  # of a rank's even share: padding and what is replicated
LINEARS = {"z_image": 34 * 7 + 32 + 6, "flux": 19 * 14 + 38 * 6 + 10, "qwen_image": 60 * 14 + 6}
VALID_SIZES = {
    "z_image": (1, 2, 3, 4, 5, 6, 8),
    "flux": (1, 2, 3, 4, 5, 6, 8),
    "qwen_image": (1, 2, 3, 4, 5, 6, 8),
}
SIZED = [(name, size) for name, sizes in VALID_SIZES.items() for size in sizes]


@functools.cache
def built(name: str) -> tuple[dict[str, Any], nn.Module, list[Layer]]:
    config = config_of(name)
    with torch.device("meta"):
        model = family(name).build(config)
    return config, model, plan_layers(model, family(name).plan(config))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_has_one_style(name: str) -> None:
    _, model, layers = built(name)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    replaced = [path for layer in layers for path in layer.replaced]
    assert sorted(replaced) == sorted(linears)
    assert len(linears) == LINEARS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_the_file_is_used_once(name: str) -> None:
    config, model, _ = built(name)
    module = family(name)
    sources, shapes = module.sources(config), module.file_tensors(config)
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for parameter, value in model.named_parameters():
        found: tuple[Source, ...] = sources(parameter)
        assert sum(source.stop - source.start for source in found) == value.shape[0], parameter
        for source in found:
            assert shapes[source.name][1:] == value.shape[1:], (parameter, source.name)
            rows[source.name].append((source.start, source.stop))
    assert rows.keys() == shapes.keys() - module.UNUSED
    for tensor, ranges in rows.items():
        assert_tiles(ranges, shapes[tensor][0])


@pytest.mark.parametrize("name", FAMILIES)
def test_valid_sizes(name: str) -> None:
    assert family(name).plan(config_of(name)).valid_tp_sizes(8) == VALID_SIZES[name]


@pytest.mark.parametrize(("name", "tp_size"), SIZED)
def test_ranks_together_hold_every_split_weight_once(name: str, tp_size: int) -> None:
    config, _, layers = built(name)
    sources, shapes = family(name).sources(config), family(name).file_tensors(config)
    held: dict[tuple[str, tuple[int, int] | None], list[tuple[int, int]]] = defaultdict(list)
    for layer in layers:
        if layer.axis is None:
            continue
        for rank in range(tp_size):
            for part in layer_parts(layer, rank, tp_size, sources):
                assert_inside(part, layer, tp_size)
                if part.columns is not None:
                    held[part.source, part.rows].append(part.columns)
                elif layer.axis == 0:
                    held[part.source, None].append(part.rows)
    assert held
    for (tensor, rows), ranges in held.items():
        assert_tiles(ranges, shapes[tensor][0 if rows is None else 1])


@pytest.mark.parametrize(("name", "tp_size"), SIZED)
def test_a_rank_holds_its_share_of_the_bytes(name: str, tp_size: int) -> None:
    config, model, layers = built(name)
    elements = 0
    for layer in layers:
        in_features, out_features = layer.local(tp_size)
        elements += in_features * out_features + layer.bias * out_features
    for parameter in whole_parameters(model, layers):
        for part in whole_parts(parameter, family(name).sources(config)):
            shape = family(name).file_tensors(config)[part.source]
            elements += (part.rows[1] - part.rows[0]) * math.prod(shape[1:])
    full = sum(parameter.numel() for parameter in model.parameters())
    ratio = elements * tp_size / full
    print(f"{name} on {tp_size}: {ratio:.4f} of an even share, {2 * elements / 2**30:.2f} GiB bf16")
    assert ratio <= MAX_BYTES


def assert_tiles(ranges: list[tuple[int, int]], length: int) -> None:
    """The ranges cover [0, length) without a gap or an overlap."""
    end = 0
    for start, stop in sorted(ranges):
        assert start == end, ranges
        end = stop
    assert end == length, ranges


def assert_inside(part: Part, layer: Layer, tp_size: int) -> None:
    """The part lies within the rank's parameter."""
    in_features, out_features = layer.local(tp_size)
    length = (part.columns or part.rows)[1] - (part.columns or part.rows)[0]
    assert part.target_start + length <= (out_features if part.axis == 0 else in_features)
