"""Each family's table and module fit together, at the published models' sizes."""

import functools
import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from tp_runtime.models import families, family_named
from tp_runtime.sharding.parts import Layer, Part, Sharding, layer_parts

# Of a rank's even share: what is replicated, and where heads do not divide, padding.
MAX_BYTES, PADDED_BYTES = 1.03, 1.05
MORE_BYTES = {"ltx2": 1.08}  # of 32 heads, 36 on six GPUs, and more than half are attention
LINEARS = {
    "z_image": 34 * 7 + 32 + 6,
    "flux": 19 * 14 + 38 * 6 + 10,
    "flux2": 8 * 12 + 48 * 2 + 11,
    "qwen_image": 60 * 14 + 6,
    "qwen_image_21": 32 * 7 + 8,
    "wan": 40 * 10 + 6,
    "minimax_h3": 50 * 7 + 2 * 6 + 2,
    "ltx2": 48 * 34 + 16 * 7 + 28,
    "krea2": 28 * 8 + 4 * 8 + 8,
    "wan, a variant": 40 * 12 + 8 + 8 * 4 + 1,
}
VALID_SIZES = {
    "z_image": (1, 2, 3, 4, 5, 6, 8),
    "flux": (1, 2, 3, 4, 5, 6, 8),
    "flux2": (1, 2, 3, 4, 5, 6, 7, 8),
    "qwen_image": (1, 2, 3, 4, 5, 6, 8),
    "qwen_image_21": (1, 2, 3, 4, 5, 6, 7, 8),
    "wan": (1, 2, 3, 4, 5, 6, 7, 8),
    "minimax_h3": (1, 2, 3, 4, 5, 6, 7, 8),
    "ltx2": (1, 2, 3, 4, 5, 6, 7, 8),
    "krea2": (1, 2, 3, 4, 5, 6, 7, 8),
    "wan, a variant": (1, 2, 3, 4, 5, 6, 7, 8),
}
SIZED = [(name, size) for name, sizes in VALID_SIZES.items() for size in sizes]
MODELS = sorted(VALID_SIZES)


def sizes_of(name: str) -> Any:
    """Of a family's published model, or of a variant that has other layers."""
    family, _, variant = name.partition(", ")
    return family_named(family).variant if variant else family_named(family).published


def test_all_are_here() -> None:
    variants = [f"{name}, a variant" for name, family in families().items() if family.variant]
    assert sorted([*families(), *variants]) == MODELS


@functools.cache
def built(name: str) -> tuple[nn.Module, Sharding]:
    sizes = sizes_of(name)
    with torch.device("meta"):
        model = family_named(name.partition(", ")[0]).forward().build(sizes)
    return model, Sharding.of(model, sizes.table.plan)


@pytest.mark.parametrize("name", MODELS)
def test_every_linear_has_one_style(name: str) -> None:
    model, sharding = built(name)
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    replaced = [path for layer in sharding.layers for path in layer.replaced]
    assert sorted(replaced) == sorted(linears)
    assert len(linears) == LINEARS[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_of_the_file_is_used_once(name: str) -> None:
    model, _ = built(name)
    table = sizes_of(name).table
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for parameter, value in model.named_parameters():
        (source,) = table.sources(parameter)
        assert source.stop - source.start == value.shape[0], parameter
        assert table.file_tensors[source.name][1:] == value.shape[1:], (parameter, source.name)
        rows[source.name].append((source.start, source.stop))
    assert rows.keys() == table.file_tensors.keys()
    for tensor, ranges in rows.items():
        assert_tiles(ranges, table.file_tensors[tensor][0])


@pytest.mark.parametrize("name", MODELS)
def test_the_table_has_all_of_the_module(name: str) -> None:
    model, _ = built(name)
    parameters = {parameter for parameter, _ in model.named_parameters()}
    assert set(sizes_of(name).table.places) == parameters


@pytest.mark.parametrize("name", MODELS)
def test_valid_sizes(name: str) -> None:
    assert sizes_of(name).table.plan.valid_tp_sizes(8) == VALID_SIZES[name]


@pytest.mark.parametrize(("name", "tp_size"), SIZED)
def test_ranks_together_hold_every_split_weight_once(name: str, tp_size: int) -> None:
    _, sharding = built(name)
    table = sizes_of(name).table
    held: dict[tuple[str, tuple[int, int] | None], list[tuple[int, int]]] = defaultdict(list)
    shared = set()  # heads of keys and values that neighbouring ranks may both need
    for layer in sharding.layers:
        if layer.axis is None:
            continue
        shared |= {
            source.name
            for section in layer.sections
            if section.split.queries
            for source in table.sources(f"{section.path}.weight")
        }
        for rank in range(tp_size):
            for part in layer_parts(layer, rank, tp_size, table.sources):
                assert_inside(part, layer, tp_size)
                if part.columns is not None:
                    held[part.source, part.rows].append(part.columns)
                elif layer.axis == 0:
                    held[part.source, None].append(part.rows)
    assert held
    for (tensor, rows), ranges in held.items():
        length = table.file_tensors[tensor][0 if rows is None else 1]
        assert_tiles(ranges, length, tensor in shared)


@pytest.mark.parametrize(("name", "tp_size"), SIZED)
def test_a_rank_holds_its_share_of_the_bytes(name: str, tp_size: int) -> None:
    model, sharding = built(name)
    table = sizes_of(name).table
    elements = sum(split.local(tp_size) for split in sharding.vectors.values())
    for layer in sharding.layers:
        in_features, out_features = layer.local(tp_size)
        elements += in_features * out_features + layer.bias * out_features
    for parameter in sharding.whole:
        (source,) = table.sources(parameter)
        rest = table.file_tensors[source.name][1:]
        elements += (source.stop - source.start) * math.prod(rest)
    full = sum(parameter.numel() for parameter in model.parameters())
    ratio = elements * tp_size / full
    print(f"{name} on {tp_size}: {ratio:.4f} of an even share, {2 * elements / 2**30:.2f} GiB bf16")
    padded = sizes_of(name).num_heads % tp_size > 0
    assert ratio <= (MORE_BYTES.get(name, PADDED_BYTES) if padded else MAX_BYTES)


def assert_tiles(ranges: list[tuple[int, int]], length: int, shared: bool = False) -> None:
    """The ranges cover [0, length) without a gap, and unless they are shared without an overlap."""
    end = 0
    for start, stop in sorted(ranges):
        assert start <= end if shared else start == end, ranges
        end = max(end, stop)
    assert end == length, ranges


def assert_inside(part: Part, layer: Layer, tp_size: int) -> None:
    """The part lies within the rank's parameter."""
    in_features, out_features = layer.local(tp_size)
    length = (part.columns or part.rows)[1] - (part.columns or part.rows)[0]
    assert part.target_start + length <= (out_features if part.axis == 0 else in_features)
