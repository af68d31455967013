"""The slices that the ranks hold: together the whole tensor, in its order, and a bias once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_runtime.sharding.parts import Layer, Part, Source, Sources, layer_of, layer_parts
from tp_runtime.sharding.plan import (
    QKV,
    Column,
    Match,
    MergedColumn,
    PlanError,
    Replicated,
    Row,
    Split,
    Style,
)

IN = 12  # features that go into a column-parallel layer, and come out of a row-parallel one

File = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, int, bool]]


def build(style: Style, outputs: dict[str, int], inputs: int = IN, bias: bool = True) -> Layer:
    """The layer that `style` makes of linears named as in `outputs`."""
    shapes: Shapes = {f"block.{name}": (inputs, out, bias) for name, out in outputs.items()}
    return layer_of(Match("block", tuple(outputs), style), shapes)


def numbered(*shape: int) -> torch.Tensor:
    """No element is zero, none occurs twice."""
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64).view(shape)


def one_to_one(file: File) -> Sources:
    """A file with the parameters' own names."""
    return lambda name: (Source(name, 0, file[name].shape[0]),)


def shard(layer: Layer, rank: int, tp_size: int, file: File, sources: Sources) -> File:
    """What the rank's layer holds, filled as `loading` fills it: padding is zero."""
    in_features, out_features = layer.local(tp_size)
    held = {f"{layer.path}.weight": torch.zeros(out_features, in_features, dtype=torch.float64)}
    if layer.bias:
        held[f"{layer.path}.bias"] = torch.zeros(out_features, dtype=torch.float64)
    for part in layer_parts(layer, rank, tp_size, sources):
        data = stored(part, file)
        place = held[part.target].narrow(part.axis, part.target_start, data.shape[part.axis])
        assert not place.any(), "written twice"
        place.copy_(data)
    return held


def stored(part: Part, file: File) -> torch.Tensor:
    data = file[part.source][slice(*part.rows)]
    return data if part.columns is None else data[:, slice(*part.columns)]


def file_of(outputs: dict[str, int], inputs: int = IN) -> File:
    """Weights and biases of some linears, no value of which occurs twice."""
    file, start = {}, 0
    for name, out in outputs.items():
        file[f"block.{name}.weight"] = numbered(out, inputs) + start
        file[f"block.{name}.bias"] = numbered(out) / 1024 + start
        start += out * inputs
    return file


tp_sizes = st.integers(1, 8)


@given(st.integers(1, 40), st.integers(1, 4), tp_sizes)
def test_column_parallel(count: int, unit: int, tp_size: int) -> None:
    outputs = {"up": count * unit}
    layer, file = build(Column((Split(count, unit),)), outputs), file_of(outputs)
    shards = [shard(layer, rank, tp_size, file, one_to_one(file)) for rank in range(tp_size)]
    for name in ("block.up.weight", "block.up.bias"):
        together = torch.cat([held[name] for held in shards])
        assert torch.equal(together[: count * unit], file[name])
        assert not together[count * unit :].any(), "the rest is padding"


@given(st.integers(1, 20), st.integers(1, 20), tp_sizes)
def test_fused_columns_are_found_on_every_rank(first: int, second: int, tp_size: int) -> None:
    outputs = {"gate": first, "up": second}
    layer, file = build(MergedColumn("both"), outputs), file_of(outputs)
    assert layer.path == "block.both"
    halves: dict[str, list[torch.Tensor]] = {"gate": [], "up": []}
    for rank in range(tp_size):
        weight = shard(layer, rank, tp_size, file, one_to_one(file))["block.both.weight"]
        lengths = [section.split.local(tp_size) for section in layer.sections]
        for name, part in zip(halves, weight.split(lengths), strict=True):
            halves[name].append(part)
    for name, parts in halves.items():
        together = torch.cat(parts)
        assert torch.equal(together[: outputs[name]], file[f"block.{name}.weight"])
        assert not together[outputs[name] :].any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp_size"),
    [(6, 6, 1), (6, 6, 2), (6, 6, 4), (30, 30, 8), (8, 2, 2), (8, 2, 4), (8, 2, 8), (8, 4, 2)],
)
def test_heads_of_one_rank_belong_together(heads: int, kv_heads: int, tp_size: int) -> None:
    width = 2
    outputs = {"q": heads * width, "k": kv_heads * width, "v": kv_heads * width}
    layer = build(QKV("qkv", width, heads, kv_heads), outputs, bias=False)
    file = file_of(outputs)
    splits = layer.match.style.splits()  # type: ignore[union-attr]
    seen: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
    for rank in range(tp_size):
        weight = shard(layer, rank, tp_size, file, one_to_one(file))["block.qkv.weight"]
        parts = weight.split([split.local(tp_size) for split in splits])
        for name, part in zip(seen, parts, strict=True):
            seen[name].append(part)
    copies = max(1, tp_size // kv_heads) if kv_heads != heads else 1
    for name, ranks in seen.items():
        distinct = ranks if name == "q" else ranks[::copies]
        together = torch.cat(distinct)
        whole = file[f"block.{name}.weight"]
        assert torch.equal(together[together.any(dim=1)], whole)
        if name != "q":
            assert all(torch.equal(ranks[i], ranks[i - i % copies]) for i in range(tp_size))


@pytest.mark.parametrize("tp_size", range(1, 9))
@pytest.mark.parametrize(
    "segments", [(), (Split(30, 2),), (Split(5, 4), Split(40))], ids=["features", "heads", "fused"]
)
def test_row_parallel_adds_its_bias_once(segments: tuple[Split, ...], tp_size: int) -> None:
    inputs = 60
    outputs = {"out": IN}
    layer = build(Row(segments), outputs, inputs)
    file = file_of(outputs, inputs)
    x = torch.randn(3, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(3, IN, dtype=torch.float64)
    for rank in range(tp_size):
        held = shard(layer, rank, tp_size, file, one_to_one(file))
        total += local_input(x, layer, rank, tp_size) @ held["block.out.weight"].T
        # Every rank holds the whole bias; vLLM's RowParallelLinear adds it on rank 0 only.
        assert torch.equal(held["block.out.bias"], file["block.out.bias"])
    expected = x @ file["block.out.weight"].T
    assert torch.allclose(total, expected, rtol=1e-12)


def local_input(x: torch.Tensor, layer: Layer, rank: int, tp_size: int) -> torch.Tensor:
    """What column-parallel layers with the same splits leave on a rank; junk where they pad."""
    pieces, begin = [], 0
    for section in layer.sections:
        start, stop = section.split.range(rank, tp_size)
        padding = torch.full(
            (x.shape[0], section.split.local(tp_size) - (stop - start)), 1e6, dtype=x.dtype
        )
        pieces += [x[:, begin + start : begin + stop], padding]
        begin += section.split.full
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("tp_size", [1, 3])
def test_replicated(tp_size: int) -> None:
    outputs = {"head": 7}
    layer, file = build(Replicated(), outputs), file_of(outputs)
    for rank in range(tp_size):
        assert shard(layer, rank, tp_size, file, one_to_one(file)).keys() == file.keys()
        for name, tensor in shard(layer, rank, tp_size, file, one_to_one(file)).items():
            assert torch.equal(tensor, file[name])


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 5, 8])
def test_a_stored_tensor_may_hold_several_linears(tp_size: int) -> None:
    """As ComfyUI's fused qkv does."""
    heads, width = 6, 2
    size = heads * width
    fused = numbered(3 * size, IN)
    names = ("q", "k", "v")
    layer = build(QKV("qkv", width, heads, heads), dict.fromkeys(names, size), bias=False)

    def sources(name: str) -> tuple[Source, ...]:
        index = names.index(name.split(".")[1])
        return (Source("fused", index * size, (index + 1) * size),)

    found: list[list[torch.Tensor]] = [[], [], []]
    for rank in range(tp_size):
        weight = shard(layer, rank, tp_size, {"fused": fused}, sources)["block.qkv.weight"]
        for parts, part in zip(found, weight.chunk(3), strict=True):
            parts.append(part)
    whole = torch.cat([torch.cat(parts)[:size] for parts in found])
    assert torch.equal(whole, fused)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 8])
def test_a_linear_may_be_stored_in_several_pieces(tp_size: int) -> None:
    """Stacked from two tensors; or one tensor with its halves the other way round."""
    file = {"scale": numbered(5, IN), "shift": numbered(7, IN) + 100, "both": numbered(12, IN)}
    layer = build(Column(), {"norm": 12}, bias=False)
    cases = {
        (Source("scale", 0, 5), Source("shift", 0, 7)): torch.cat((file["scale"], file["shift"])),
        (Source("both", 6, 12), Source("both", 0, 6)): file["both"].roll(6, 0),
    }
    for pieces, expected in cases.items():
        shards = [
            shard(layer, rank, tp_size, file, lambda _, pieces=pieces: pieces)
            for rank in range(tp_size)
        ]
        together = torch.cat([held["block.norm.weight"] for held in shards])
        assert torch.equal(together[:12], expected)


def test_nothing_is_read_twice_nor_for_padding() -> None:
    layer = build(Column((Split(10, 4),)), {"up": 40})
    file = file_of({"up": 40})
    parts = [part for rank in range(8) for part in layer_parts(layer, rank, 8, one_to_one(file))]
    rows = [row for part in parts if part.target == "block.up.weight" for row in range(*part.rows)]
    assert rows == list(range(40))
    assert all(part.rows[1] > part.rows[0] for part in parts)


@pytest.mark.parametrize(
    ("style", "outputs", "message"),
    [
        (QKV("qkv", 8, 2, 2), {"q": 16, "k": 16, "v": 24}, "block.v has 24 outputs, its plan 16"),
        (
            Column((Split(2, 5),)),
            {"up": 12},
            "segments of block.up do not add up to its 12 outputs",
        ),
        (MergedColumn("both", (1, 5)), {"a": 4, "b": 12}, "block.b has 12 outputs, its plan 10"),
        (Row((Split(5, 2),)), {"out": 4}, "do not add up to its 12 inputs"),
        (Column(), {"a": 4, "b": 4}, "cannot be one Column layer"),
        (MergedColumn("both"), {"a": 4}, "cannot be one MergedColumn layer"),
    ],
)
def test_a_style_that_does_not_fit(style: Style, outputs: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build(style, outputs)


def test_linears_of_different_inputs_cannot_be_fused() -> None:
    shapes: Shapes = {"a": (4, 8, False), "b": (5, 8, False), "c": (4, 8, True)}
    for names in (("a", "b"), ("a", "c")):
        with pytest.raises(PlanError, match="cannot be one MergedColumn layer"):
            layer_of(Match("", names, MergedColumn("both")), shapes)
