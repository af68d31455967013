"""Grouped-query attention over more ranks than key/value heads, on simulated ranks.

As vLLM's layer of q, k and v deals heads out, which no model has yet. The slices come from the same
`layer_parts` that loading follows; here every rank is a plain matrix product in this process, and
the all-reduce a sum.
"""

import pytest
import torch
import torch.nn.functional as F

from tp_runtime.client import SizeError
from tp_runtime.sharding.parts import Layer, Part, Source, layer_of, layer_parts
from tp_runtime.sharding.plan import QKV, Plan, Row

DIM, HEAD_DIM, LENGTH = 96, 8, 11

# (query heads, key/value heads, ranks)
CASES = [
    (12, 2, 2),  # whole groups
    (12, 4, 2),
    (12, 2, 4),  # two ranks share a key/value head
    (8, 1, 4),  # all ranks share it
    (30, 2, 4),  # and a group's 15 query heads are padded to 16
    (8, 8, 4),  # plain
    (15, 15, 4),  # plain and padded
]


def plan(heads: int, kv_heads: int) -> Plan:
    qkv = QKV("to_qkv", HEAD_DIM, heads, kv_heads)
    return Plan({"attn.{q,k,v}": qkv, "attn.out": Row((qkv.splits()[0],))})


def layers(heads: int, kv_heads: int) -> dict[str, Layer]:
    shapes = {
        "attn.q": (DIM, heads * HEAD_DIM, True),
        "attn.k": (DIM, kv_heads * HEAD_DIM, True),
        "attn.v": (DIM, kv_heads * HEAD_DIM, True),
        "attn.out": (heads * HEAD_DIM, DIM, True),
    }
    matches = plan(heads, kv_heads).match(list(shapes))
    return {layer.path: layer for layer in (layer_of(match, shapes) for match in matches)}


def stored(shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
        tensors[f"attn.{name}.weight"] = weight / in_features**0.5
        tensors[f"attn.{name}.bias"] = torch.randn(out_features, generator=generator).double()
    return tensors


def attend(qkv: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """(L, (heads + 2 kv_heads) K) → (L, heads K)."""
    sizes = [heads * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]
    q, k, v = (part.unflatten(-1, (-1, HEAD_DIM)).movedim(1, 0) for part in qkv.split(sizes, -1))
    k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v).movedim(0, 1).flatten(1)


def local(
    layer: Layer, rank: int, tp_size: int, file: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """The rank's weight and bias, as loading fills them: zero but for the parts."""
    in_features, out_features = layer.local(tp_size)
    tensors = {
        f"{layer.path}.weight": torch.zeros(out_features, in_features, dtype=torch.float64),
        f"{layer.path}.bias": torch.zeros(out_features, dtype=torch.float64),
    }

    def whole(name: str) -> tuple[Source, ...]:
        return (Source(name, 0, len(file[name])),)

    for part in layer_parts(layer, rank, tp_size, whole):
        data = read(file, part)
        tensors[part.target].narrow(part.axis, part.target_start, data.shape[part.axis]).copy_(data)
    return list(tensors.values())


def read(file: dict[str, torch.Tensor], part: Part) -> torch.Tensor:
    rows = file[part.source][slice(*part.rows)]
    return rows if part.columns is None else rows[:, slice(*part.columns)]


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), CASES)
def test_the_ranks_sum_to_the_whole(heads: int, kv_heads: int, tp_size: int) -> None:
    model = layers(heads, kv_heads)
    width, kv_width = heads * HEAD_DIM, kv_heads * HEAD_DIM
    file = stored(
        {"q": (width, DIM), "k": (kv_width, DIM), "v": (kv_width, DIM), "out": (DIM, width)}
    )
    x = torch.randn(LENGTH, DIM, dtype=torch.float64)

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, file[f"attn.{name}.weight"], file[f"attn.{name}.bias"])

    qkv = torch.cat([linear(name, x) for name in "qkv"], dim=-1)
    expected = linear("out", attend(qkv, heads, kv_heads))

    plan(heads, kv_heads).check_tp_size(tp_size, "This model")
    total = torch.zeros_like(expected)
    for rank in range(tp_size):
        weight, bias = local(model["attn.to_qkv"], rank, tp_size, file)
        splits = [block.split.local_count(tp_size) for block in model["attn.to_qkv"].sections]
        attended = attend(F.linear(x, weight, bias), splits[0], splits[1])
        weight, bias = local(model["attn.out"], rank, tp_size, file)
        total += F.linear(attended, weight, bias if rank == 0 else None)
    assert torch.allclose(total, expected, rtol=0, atol=1e-12)


def test_key_value_heads_are_shared_by_neighbouring_ranks() -> None:
    model = layers(12, 2)["attn.to_qkv"]
    file = {f"attn.{n}.weight": (96 if n == "q" else 16) for n in "qkv"}
    file |= {name.replace("weight", "bias"): rows for name, rows in file.items()}

    def parts_of(rank: int, name: str) -> list[tuple[int, int]]:
        found = layer_parts(model, rank, 4, lambda n: (Source(n, 0, file[n]),))
        return [part.rows for part in found if part.source == f"attn.{name}.weight"]

    assert [parts_of(rank, "k") for rank in range(4)] == [
        [(0, 8)],
        [(0, 8)],
        [(8, 16)],
        [(8, 16)],
    ]
    assert [parts_of(rank, "q") for rank in range(4)] == [
        [(24 * rank, 24 * rank + 24)] for rank in range(4)
    ]


@pytest.mark.parametrize(("heads", "kv_heads", "tp_size"), [(12, 4, 3), (12, 3, 4), (12, 2, 7)])
def test_sizes_that_would_cut_a_group_are_refused(heads: int, kv_heads: int, tp_size: int) -> None:

    with pytest.raises(SizeError, match=f"num_kv_heads={kv_heads}"):
        plan(heads, kv_heads).check_tp_size(tp_size, "This model")
