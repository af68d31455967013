"""Compiled chains of operations. What compiles them for a GPU is not here: it is counted."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tp_runtime.gpu import graphs
from tp_runtime.models import layers


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The graphs that are compiled; they run as they are written."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def test_every_number_of_tokens_is_compiled(
    compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not eight of a function and 256 of all together, which are torch's own limits."""
    monkeypatch.setattr(torch._dynamo.config, "accumulated_recompile_limit", 16)
    silu_gate = graphs.fused(layers.silu_gate.__wrapped__)
    count = 20
    with graphs._optimised():
        for length in range(1, count + 1):
            silu_gate(torch.randn(1, length, 4))
    assert len(compiled) == count


class _NotRecorded:
    """In the place of a CUDA graph, whose recording is another run of what it records."""

    def replay(self) -> None:
        pass


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are recorded without a GPU."""
    for name, value in {
        "CUDAGraph": _NotRecorded,
        "graph": lambda *_, **__: contextlib.nullcontext(),
        "graph_pool_handle": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.usefixtures("recording")
def test_a_tensor_that_many_blocks_are_given_is_copied_once() -> None:
    """Of which blocks are given the same, the graph is."""
    seen: list[list[torch.Tensor]] = []
    recorded = graphs.RecordedEvaluation(
        lambda residuals: seen.append(residuals),
        contextlib.nullcontext,
        torch.nn.functional.scaled_dot_product_attention,
        2**30,
    )
    one, other = torch.zeros(2), torch.ones(2)
    for residuals in ([one, other, one, other], [one, one, other, other]):
        for _ in range(3):
            recorded(residuals=residuals)
    assert len(seen) == 4  # as written, and recorded, of each order
    for given, residuals in ((seen[1], seen[0]), (seen[3], seen[2])):
        assert len({id(tensor) for tensor in given}) == 2
        assert all(map(torch.equal, given, residuals))
    assert seen[1][0] is seen[1][2]
    assert seen[3][0] is seen[3][1]


@pytest.mark.usefixtures("recording")
def test_nothing_is_compiled_while_a_graph_is_recorded(compiled: list[Any]) -> None:
    """Conditioning may be a part of a larger tensor, or turned; a graph's copy of it is not."""
    silu_gate = graphs.fused(layers.silu_gate.__wrapped__)
    captions = torch.randn(2, 3, 8).split(4, dim=-1)
    turned = torch.randn(4, 3, 2).transpose(0, 2)
    recorded = graphs.RecordedEvaluation(
        lambda captions, turned: [silu_gate(one) for one in (*captions, turned)],
        contextlib.nullcontext,
        torch.nn.functional.scaled_dot_product_attention,
        2**30,
    )
    inputs = {"captions": captions, "turned": turned}
    expected = recorded(**inputs)
    before = len(compiled)
    assert before
    found = recorded(**inputs)
    assert len(compiled) == before
    assert all(map(torch.equal, found, expected))
