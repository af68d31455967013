"""What is remembered of a prompt, and what recorded evaluations copy, stays within its bounds."""

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tp_runtime.gpu import graphs
from tp_runtime.gpu.graphs import RecordedEvaluation
from tp_runtime.models.forward import MEMO_BYTES, Conditioning, Memo, memo_bytes


def test_keys_and_values_in_lists_count() -> None:
    """840 bytes a prompt: of 1000, there is room for one."""
    computed = []

    def conditioning(name: str) -> Conditioning:
        computed.append(name)
        pair = torch.zeros(100), torch.zeros(100)
        return {"prefix": [pair], "rotation": torch.zeros(10), "skip": (1, 2)}

    memo = Memo(1000)
    for name in ("a", "a", "b", "b", "a"):
        memo.get(name, lambda name=name: conditioning(name))
    assert computed == ["a", "b", "a"]


def test_without_a_gpu_it_is_a_few_gigabytes() -> None:
    assert memo_bytes(torch.device("cpu")) == MEMO_BYTES


class _Graph:
    """Stands for a CUDA graph, which needs a GPU."""

    recorded: Sequence[int] = ()

    def __init__(self, _: Any, leaves: Sequence[torch.Tensor], *__: Any) -> None:
        self.input_bytes = sum(leaf.nbytes for leaf in leaves)
        type(self).recorded = [*self.recorded, len(leaves[0])]

    def replay(self, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        return leaves[0]


def test_graphs_of_large_inputs_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 bytes: two of 400 stay, a third drops the one that was used longest ago."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "_Graph", _Graph)
    monkeypatch.setattr(_Graph, "recorded", ())
    run = RecordedEvaluation(lambda x: x, contextlib.nullcontext, lambda q, *_: q, 1000)
    for length in (100, 101, 100, 102, 100, 101):
        for _ in range(2):
            run(x=torch.zeros(length))
    assert _Graph.recorded == [100, 101, 102, 101]
    for _ in range(2):
        run(x=torch.zeros(1000))  # more than the bound: it stays, alone
    run(x=torch.zeros(1000))
    assert _Graph.recorded == [100, 101, 102, 101, 1000]


def test_what_entries_have_in_common_is_computed_once() -> None:
    """Also where the entries that hold it have gone."""
    memo, computed = Memo(100), [0]

    def part(key: str, *given: torch.Tensor) -> torch.Tensor:
        def compute() -> torch.Tensor:
            computed[0] += 1
            return torch.full((30,), float(computed[0]))

        return memo.part(key, given, compute)

    video, caption = torch.ones(2, 3), torch.zeros(4)
    first = part("a", video, caption)
    for name in ("positive", "negative"):
        held = memo.get(name, lambda: {"poses": part("a", video.clone(), caption.clone())})
        assert held["poses"] is first
    assert computed == [1]
    for key, given in (
        ("b", (video, caption)),
        ("b", (video, caption + 1)),
        ("b", (video,)),
        ("b", (video[:1],)),
        ("a", (video, caption)),
    ):
        computed[0] = 1
        assert part(key, *given)[0] == 2, (key, given)


def test_ranks_with_less_to_remember_forget_what_others_do() -> None:
    """By the largest entry among the ranks, since each may wait for the others in the next one."""
    computed: list[str] = []

    def conditioning(name: str) -> Conditioning:
        computed.append(name)
        return {"prefix": torch.zeros(1, dtype=torch.uint8)}

    memo = Memo(1000, lambda own: own + 599)
    for name in ("a", "b", "a"):
        memo.get(name, lambda name=name: conditioning(name))
    assert computed == ["a", "b", "a"]
