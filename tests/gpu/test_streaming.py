"""A GPU that may hold a part of a model only: the same bits, as written, recorded and replayed."""

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gpu.conftest import FAMILIES, Load, evaluate, in_dtype, make_inputs, steps
from gpu.test_step import on_rank, patches_of
from torch import nn

from support.tiny_models import write_fp8, write_tiny
from tp_runtime.client import RemoteModel, Runtime
from tp_runtime.gpu.streaming import LayerStream, StreamedLayer
from tp_runtime.rank.host_copy import HostMemory

pytestmark = pytest.mark.gpu

SHARE, SHARES = 0.6, {"krea2": 0.8}
SLACK = 2**21  # of the allocator's rounding
WIDTH, LAYERS = 4096, 9


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny(name, folder / f"{name}.safetensors") for name in FAMILIES}


def limit_for(whole: RemoteModel) -> int:
    (size,) = whole.loaded_bytes()
    return int(SHARES.get(whole.info.family.name, SHARE) * size)


@contextmanager
def limited(whole: RemoteModel) -> Iterator[tuple[Runtime, RemoteModel]]:
    """The same model in a runtime of its own, whose GPU may hold a part of it."""
    runtime = Runtime()
    try:
        config = dataclasses.replace(whole.group_config, gpu_memory=limit_for(whole))
        model = runtime.model(whole.spec, config)
        model.ensure_loaded()
        yield runtime, model
    finally:
        runtime.release()


def assert_equal_steps(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps(load: Load, files: dict[str, Path], family: str, dtype: str) -> None:
    """Of two sizes in turns, whose graphs use the ring alike."""
    whole = load(files[family], dtype)
    each = [in_dtype(make_inputs(family, height), getattr(torch, dtype)) for height in (12, 16)]
    expected = [steps(whole, inputs) for inputs in each]
    with limited(whole) as (runtime, model):
        for inputs, of_each in zip(each, expected, strict=True):
            assert_equal_steps(steps(model, inputs), of_each)
        for inputs, of_each in zip(each, expected, strict=True):
            assert torch.equal(evaluate(model, inputs), of_each[-1])
        assert on_rank(runtime, model)["model"]["streamed_bytes"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_memory(load: Load, runtime: Runtime, files: dict[str, Path], family: str) -> None:
    """At no time does it take more than the limit, beside what the whole model takes, too."""
    runtime.release()
    whole, inputs = load(files[family]), make_inputs(family)
    steps(whole, inputs)
    said = on_rank(runtime, whole)
    beside = said["memory"]["peak_bytes"] - said["model"]["resident_bytes"]
    with limited(whole) as (own, model):
        steps(model, inputs)
        found = on_rank(own, model)
        assert found["model"]["resident_bytes"] <= limit_for(whole)
        assert found["memory"]["peak_bytes"] <= limit_for(whole) + beside + SLACK


@pytest.mark.parametrize("family", FAMILIES)
def test_sleep_and_lora(load: Load, runtime: Runtime, files: dict[str, Path], family: str) -> None:
    whole, inputs = load(files[family]), make_inputs(family)
    plain = steps(whole, inputs)
    with limited(whole) as (own, model):
        assert_equal_steps(steps(model, inputs), plain)
        awake = on_rank(own, model, digests=True)
        assert awake["model"]["digest"] == on_rank(runtime, whole, digests=True)["model"]["digest"]
        model.sleep()
        asleep = on_rank(own, model, digests=True)
        assert asleep["model"]["digest"] == awake["model"]["digest"]
        freed = awake["memory"]["allocated_bytes"] - asleep["memory"]["allocated_bytes"]
        assert freed >= awake["model"]["resident_bytes"]
        model.ensure_loaded()
        assert_equal_steps(steps(model, inputs), plain)
        for strength in (0.8, -0.3, None):
            for one in (whole, model):
                one.patch(strength, {} if strength is None else patches_of(one, strength))
                one.ensure_loaded()
            assert torch.equal(evaluate(model, inputs), evaluate(whole, inputs))
        assert torch.equal(evaluate(model, inputs), plain[-1])


def test_fp8(load: Load, files: dict[str, Path], tmp_path: Path) -> None:
    path = write_fp8(files["flux"], tmp_path / "fp8.safetensors", "scaled")
    whole, inputs = load(path, "bfloat16"), in_dtype(make_inputs("flux"), torch.bfloat16)
    expected = steps(whole, inputs)
    with limited(whole) as (_, model):
        assert_equal_steps(steps(model, inputs), expected)


# --- what waits for what -----------------------------------------------------------------------


class _Product:
    """A product that takes long beside the copies, or not at all."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: None = None) -> torch.Tensor:
        for _ in range(self.repeats):
            found = F.linear(x, layer.weight, bias)
        return found


def _streamed(repeats: list[int]) -> tuple[LayerStream, list[nn.Module], HostMemory]:
    """Layers of 32 MiB with a ring for two and a half of them."""
    layers: list[nn.Module] = []
    like = {str(i): torch.empty(WIDTH, WIDTH, dtype=torch.float16) for i in range(LAYERS)}
    memory = HostMemory(like, locked=True)
    streamed = []
    for index, count in enumerate(repeats):
        tensor = memory.tensors[str(index)]
        tensor.copy_(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        layer = nn.Module()
        layer.weight = nn.Parameter(tensor, requires_grad=False)
        layer.quant_method = _Product(count)  # type: ignore[assignment]
        layers.append(layer)
        streamed.append(
            StreamedLayer(layer, memory.spanned(str(index), str(index)), {"weight": tensor})
        )
    ring_bytes = int(2.5 * WIDTH * WIDTH * 2)
    return LayerStream(streamed, torch.device("cuda", 0), ring_bytes), layers, memory


@torch.inference_mode()
def test_no_copy_overtakes_a_product() -> None:
    """Nor a product its copy: eagerly, with orders that change, and in a graph, 20 times each."""
    generator = random.Random(0)
    stream, layers, memory = _streamed([generator.choice((1, 40)) for _ in range(LAYERS)])
    x = torch.randn(512, WIDTH, device="cuda", dtype=torch.float16)

    def evaluate(x: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
        for index in order:
            x = layers[index].quant_method.apply(layers[index], x)
        return x

    def expected(order: tuple[int, ...]) -> torch.Tensor:
        found = x
        for index in order:
            found = F.linear(found, memory.tensors[str(index)].cuda())
        return found

    def assert_right(found: torch.Tensor, order: tuple[int, ...]) -> None:
        # One row of another layer's weight would be as far off as the numbers are large.
        right = expected(order)
        assert (found - right).abs().max() <= 1e-2 * right.abs().max()

    run, every = stream.passes(evaluate), tuple(range(LAYERS))
    orders = [every, tuple(generator.choices(every, k=12)), (0, 0, 1, 1, 2, 2), every[::-1]]
    for _ in range(20):
        for order in orders:
            assert_right(run(x=x, order=order), order)
    graphs = {}
    for order in orders:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run(x=x, order=order)
        graphs[order] = graph, result
    for _ in range(20):
        for order, (graph, result) in graphs.items():
            graph.replay()
            assert_right(result, order)
        torch.cuda.synchronize()
        memory.tensors["3"].mul_(-1)  # as a patch changes it
    del graphs
    memory.close()
