"""Layers that are streamed: which they are, and what they compute with in whatever order."""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tp_runtime.errors import SizeError
from tp_runtime.gpu.products import multiply
from tp_runtime.gpu.streaming import LayerStream, StreamedLayer, _Pass
from tp_runtime.models import families
from tp_runtime.rank.host_copy import HostMemory
from tp_runtime.sharding.parts import Sharding
from tp_runtime.sharding.streaming import RING_LAYERS, LayerSize, layers_of, streaming_plan
from tp_runtime.sharding.table import ALL, IMAGE, ITEM, PROMPT

WIDTH = 16


# --- which layers --------------------------------------------------------------------------------


def blocks(count: int, *layers: tuple[str, int]) -> list[LayerSize]:
    """``layers`` of each block: what passes through it, and its bytes."""
    return [
        LayerSize(f"{index}.{place}", over, nbytes)
        for index in range(count)
        for place, (over, nbytes) in enumerate(layers)
    ]


def test_what_fits_is_not_streamed() -> None:
    layers = blocks(4, (ALL, 100))
    assert streaming_plan("A model", layers, 500, None) is None
    assert streaming_plan("A model", layers, 500, 500) is None
    assert streaming_plan("A model", layers, 500, 499) is not None


def test_layers_are_taken_at_even_distances() -> None:
    plan = streaming_plan("A model", blocks(100, (ALL, 10)), 1000, 780)
    assert plan is not None
    assert plan.ring_bytes == 30
    numbers = [int(path.partition(".")[0]) for path in plan.paths]
    assert len(numbers) == 25
    assert {after - before for before, after in pairwise(numbers)} == {4}


def test_what_a_step_does_not_use_goes_first_and_modulation_last() -> None:
    layers = blocks(10, (PROMPT, 10), (ITEM, 10), (IMAGE, 10))

    def streamed(limit: int) -> dict[str, int]:
        plan = streaming_plan("A model", layers, 300, limit)
        assert plan is not None
        kinds = [path.partition(".")[2] for path in plan.paths]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    assert streamed(280) == {"0": 5}
    assert streamed(200) == {"0": 10, "2": 3}
    assert streamed(80) == {"0": 10, "1": 5, "2": 10}


def test_no_plan_takes_more_than_it_may() -> None:
    generator = random.Random(0)
    for _ in range(200):
        layers = [
            LayerSize(str(index), generator.choice((ALL, ITEM, PROMPT)), generator.randint(1, 500))
            for index in range(generator.randint(1, 40))
        ]
        sizes = {layer.path: layer.nbytes for layer in layers}
        total = sum(sizes.values()) + generator.randint(0, 300)
        least = total - sum(sizes.values()) + RING_LAYERS * max(sizes.values())
        limit = generator.randint(least, max(least, total))
        plan = streaming_plan("A model", layers, total, limit)
        if plan is None:
            assert total <= limit
            continue
        assert total - sum(sizes[path] for path in plan.paths) + plan.ring_bytes <= limit
        assert plan.ring_bytes >= max(sizes[path] for path in plan.paths)


def test_what_cannot_be_streamed_must_fit() -> None:
    with pytest.raises(
        SizeError, match=r"A model needs at least 4\.00 GiB .* 3\.99 GiB may be used"
    ):
        streaming_plan("A model", blocks(9, (ALL, 2**30)), 10 * 2**30, int(3.99 * 2**30))
    with pytest.raises(SizeError, match="TP_RUNTIME_GPU_MEMORY"):
        streaming_plan("A model", [], 2**30, 1)


@pytest.mark.parametrize("model", sorted(families()))
@pytest.mark.parametrize("tp_size", [1, 2])
def test_layers_are_known_without_a_module(model: str, tp_size: int) -> None:
    """The same as those that a rank builds, one by one."""
    sizes = families()[model].small
    table = sizes.table
    with torch.device("meta"):
        module = families()[model].forward().build(sizes)
    built = sorted(
        (over, 2 * math.prod(layer.local(tp_size)))
        for layer in Sharding.of(module, table.plan).layers
        if (over := table.passing.get(layer.replaced[0])) is not None
    )
    found = layers_of(table, tp_size, 2)
    assert sorted((layer.over, layer.nbytes) for layer in found) == built
    assert len({layer.path for layer in found}) == len(built)


# --- what they compute with ----------------------------------------------------------------------


class Layer(nn.Module):
    """As much of a parallel layer as a streamed one needs."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, WIDTH), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(rows), requires_grad=False)
        self.quant_method = UnquantizedLinearMethod()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.quant_method.apply(self, x, self.bias)
        return found


@pytest.fixture
def layers() -> list[Layer]:
    torch.manual_seed(0)
    return [Layer(rows) for rows in (4, 12, 4, 8, 12, 6, 10)]


def stream_of(layers: list[Layer], largest: float = RING_LAYERS) -> LayerStream:
    """``largest``: the ring's length in largest layers."""
    like = {str(index): layer.weight.data for index, layer in enumerate(layers)}
    memory = HostMemory(like, locked=False)
    streamed = []
    for name, layer in enumerate(layers):
        tensor = memory.tensors[str(name)].copy_(layer.weight)
        layer.weight.data = tensor
        streamed.append(
            StreamedLayer(layer, memory.spanned(str(name), str(name)), {"weight": tensor})
        )
    ring_bytes = int(largest * max(one.host.nbytes for one in streamed))
    return LayerStream(streamed, torch.device("cpu"), ring_bytes)


Order = list[int]


def evaluation(layers: list[Layer], order: Order) -> Callable[..., list[torch.Tensor]]:
    def evaluate(x: torch.Tensor, kind: object = None) -> list[torch.Tensor]:
        return [layers[index](x) for index in order]

    return evaluate


@pytest.mark.parametrize("largest", [1, 1.5, 2, 3, 10])
def test_any_order(layers: list[Layer], largest: float) -> None:
    """The one that is expected, and others that deviate from it, are longer or shorter."""
    x = torch.randn(3, WIDTH)
    expected = [F.linear(x, layer.weight.clone(), layer.bias) for layer in layers]
    stream = stream_of(layers, largest)
    generator = random.Random(0)
    every = list(range(len(layers)))
    orders: list[Order] = [every, every, every, every[:3], every, [], every, [1, 1, 2, 1, 1, 2]]
    orders += [generator.choices(every, k=generator.randint(0, 20)) for _ in range(40)]
    for order in orders:
        for _ in range(generator.randint(1, 3)):
            found = stream.passes(evaluation(layers, order))(x=x)
            for index, result in zip(order, found, strict=True):
                assert torch.equal(result, expected[index])
    assert torch.equal(layers[2](x), expected[2]), "outside of an evaluation"


def test_layers_are_read_ahead_once_their_order_is_known(
    layers: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    copy, place_of = _Pass._copy, _Pass.place_of

    def copying(self: _Pass, host: torch.Tensor, *rest: object) -> object:
        events.append("copy")
        return copy(self, host, *rest)  # type: ignore[arg-type]

    def using(self: _Pass, layer: StreamedLayer) -> object:
        events.append("use")
        return place_of(self, layer)

    monkeypatch.setattr(_Pass, "_copy", copying)
    monkeypatch.setattr(_Pass, "place_of", using)
    stream, x = stream_of(layers, 2), torch.randn(3, WIDTH)
    evaluate = stream.passes(evaluation(layers, [0, 1, 4, 3]))
    evaluate(x=x)
    assert events == ["use"] * 4
    events.clear()
    evaluate(x=x)
    # Two of the largest have room, with a small one before them one; what is used makes room.
    assert events == ["copy", "copy", "use", "use", "copy", "copy", "use", "use"]
    events.clear()
    stream.passes(evaluation(layers, [0, 1]))(x=x, kind="another")
    assert events == ["use"] * 2


def test_layers_lie_where_any_kernel_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in int8 and fp8 want 16 bytes, and a layer may end with four for each row."""
    layers = [Layer(rows) for rows in (3, 5, 1, 7, 9, 2, 11)]
    stream, x = stream_of([layer.double() for layer in layers]), torch.randn(3, WIDTH).double()
    places, place_of = [], _Pass.place_of

    @contextlib.contextmanager
    def using(self: _Pass, layer: StreamedLayer) -> Iterator[torch.Tensor]:
        with place_of(self, layer) as place:
            places.append(place.data_ptr())
            yield place

    monkeypatch.setattr(_Pass, "place_of", using)
    evaluate = stream.passes(evaluation(layers, list(range(len(layers)))))
    for _ in range(2):  # the second time they lie one behind another
        places.clear()
        evaluate(x=x)
        offsets = [place - min(places) for place in places]
        assert not [offset for offset in offsets if offset % 256]
    assert len(set(offsets)) > 3


def test_parameters_are_the_hosts_meanwhile(layers: list[Layer]) -> None:
    """Where patches change them; the next evaluation computes with what they are then."""
    stream, x = stream_of(layers), torch.randn(3, WIDTH)
    addresses = [layer.weight.data_ptr() for layer in layers]
    evaluate = stream.passes(evaluation(layers, [0, 1, 2]))
    for factor in (1, 2, 3):
        before = [layer.weight.clone() for layer in layers]
        found = evaluate(x=x)
        assert torch.equal(found[1], F.linear(x, before[1], layers[1].bias)), factor
        assert [layer.weight.data_ptr() for layer in layers] == addresses
        layers[1].weight.mul_(2)

    def broken(x: torch.Tensor) -> None:
        layers[0](x)
        with stream.at_hand(layers[1]):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        stream.passes(broken)(x=x)
    assert [layer.weight.data_ptr() for layer in layers] == addresses


def test_a_product_of_our_own(layers: list[Layer]) -> None:
    """``multiply`` computes with a streamed weight as with one that lies on the device."""
    x = torch.randn(2, 3, WIDTH)
    expected = [multiply(layer, x, layer.bias, gelu=True) for layer in layers]
    stream_of(layers)
    for layer, one in zip(layers, expected, strict=True):
        out = torch.empty_like(one)
        assert torch.equal(multiply(layer, x, layer.bias, gelu=True, out=out), one)
        assert torch.equal(out, one)
