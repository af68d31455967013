"""What ranks that share tokens do with a mask over all of them, and with keys that each has.

And what they compute while tokens are on their way.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tp_runtime.models.dual_stream import NORM_EPS, BlockInputs, attention_beside_mlp
from tp_runtime.models.layers import attention, heads_of, rotated_heads
from tp_runtime.models.token_shares import TokenShares

# Two ranks, of which this is the first.
GROUP: Any = SimpleNamespace(sequence_size=lambda: 2, sequence_rank=lambda: 0)


class Devices(TorchDispatchMode):
    """Where the tensors are that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found.add(result.device.type)
        return result


# Of 3 and 5 tokens: those of the first rank, then those of the second.
ORDER = [0, 1, 3, 4, 5, 2, 6, 7]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_mask_follows_the_tokens(rows: int) -> None:
    mask = torch.arange(rows * 8).view(1, 1, rows, 8)
    found = TokenShares(GROUP, (3, 5)).in_their_order(mask)
    expected = mask[..., ORDER] if rows == 1 else mask[..., ORDER, :][..., ORDER]
    assert found is not None
    assert torch.equal(found, expected)


def test_the_order_of_a_mask_is_made_where_the_mask_is() -> None:
    """A CUDA graph that is recorded refuses a copy from the host."""
    mask = torch.ones(1, 1, 8, 8, device="meta")
    with Devices() as devices:
        TokenShares(GROUP, (3, 5)).in_their_order(mask)
    assert devices.found == {"meta"}


class Threads:
    """Ranks that are threads: what each gives to the others in an exchange."""

    def __init__(self, size: int, turns: int = 1) -> None:
        self.size, self.turns = size, turns
        self.given = dict[int, Sequence[torch.Tensor]]()
        self.asked = list[int]()  # for turns: the bytes that each rank spoke of
        self.barrier = Barrier(size)

    def turns_for(self, num_bytes: int) -> int:
        self.asked.append(num_bytes)
        return self.turns

    def of_rank(self, rank: int) -> Any:
        def begin(
            parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
        ) -> Callable[[], list[torch.Tensor]]:
            self.given[rank] = parts
            self.barrier.wait(timeout=60)
            found = [self.given[other][rank] for other in range(self.size)]
            self.barrier.wait(timeout=60)
            assert [tuple(one.shape) for one in found] == [tuple(shape) for shape in shapes]
            return lambda: found

        return SimpleNamespace(
            sequence_size=lambda: self.size,
            sequence_rank=lambda: rank,
            begin_exchange=begin,
            turns=self.turns_for,
            exchanges_beside=lambda: True,
        )


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("num_kv", [6, 3, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7])
def test_keys_that_every_rank_has_come_first(size: int, num_kv: int, turns: int) -> None:
    """Of 6 heads and fewer of keys, which need not divide, and in some turns a rank has none."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, heads, 16) for heads in (6, num_kv, num_kv))
    before = torch.randn(2, 5, num_kv, 16), torch.randn(2, 5, num_kv, 16)
    threads = Threads(size, turns)

    def of_rank(rank: int) -> torch.Tensor:
        shares = TokenShares(threads.of_rank(rank), [7])
        return shares.attention(*(shares.own(part) for part in (q, k, v)), before=before)

    with ThreadPoolExecutor(size) as pool:
        found = torch.cat(list(pool.map(of_rank, range(size))), dim=1)
    of_all = (torch.cat(pair, dim=1) for pair in zip(before, (k, v), strict=True))
    torch.testing.assert_close(found, attention(q, *of_all))
    num_bytes = 4 * 2 * 7 * 16 * (6 + 2 * (6 if num_kv % size else num_kv)) // size**2
    assert threads.asked == [num_bytes] * (size if size > 1 else 0)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(7, 5), (2, 9)])
@pytest.mark.parametrize("num_kv", [6, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_tokens_look_at_others_that_are_shared(
    size: int, num_kv: int, num_queries: int, num_keys: int, turns: int
) -> None:
    """As video looks at sound; some ranks have no token, or no head."""
    torch.manual_seed(0)
    q = torch.randn(2, num_queries, 6, 16)
    k, v = (torch.randn(2, num_keys, num_kv, 16) for _ in range(2))
    weight = torch.randn(1, 1, 1, num_keys)
    threads = Threads(size, turns)

    def of_rank(rank: int) -> torch.Tensor:
        group = threads.of_rank(rank)
        ours, theirs = TokenShares(group, [num_queries]), TokenShares(group, [num_keys])
        given = ours.own(q), theirs.own(k), theirs.own(v), weight
        return ours.attention(*given, of_keys=theirs)

    with ThreadPoolExecutor(size) as pool:
        found = torch.cat(list(pool.map(of_rank, range(size))), dim=1)
    torch.testing.assert_close(found, attention(q, k, v, weight))
    assert len(set(threads.asked)) == (size > 1)  # also those that have no token


def test_another_attention_sees_all_tokens() -> None:
    """In their order, of some of the heads, with what else it is given."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 4, 8) for _ in range(3))
    threads = Threads(2, turns=2)  # but all of its heads at once

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, late: int) -> torch.Tensor:
        return torch.cat((attention(q[:, :late], k, v), 2 * attention(q[:, late:], k, v)), dim=1)

    def of_rank(rank: int) -> torch.Tensor:
        shares = TokenShares(threads.of_rank(rank), [5])
        return shares.attention(*map(shares.own, (q, k, v)), 4, attend=attend)

    with ThreadPoolExecutor(2) as pool:
        found = torch.cat(list(pool.map(of_rank, range(2))), dim=1)
    torch.testing.assert_close(found, attend(q, k, v, 4))


class Multiplied:
    """A linear of q, k and v of two heads, and of 16 features beside them; notes its products."""

    output_partition_sizes = (8, 8, 8, 16)
    bias = None
    quant_method = UnquantizedLinearMethod()

    def __init__(self, weight: torch.Tensor, noted: list[str]) -> None:
        self._weight, self._noted = weight, noted

    @property
    def weight(self) -> torch.Tensor:
        self._noted.append("product")
        return self._weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize(
    ("size", "order"), [(1, ["product"]), (2, ["product", "sent", "sent", "product", "sent"])]
)
def test_features_are_computed_while_tokens_are_on_their_way(size: int, order: list[str]) -> None:
    torch.manual_seed(0)
    normed, weight, rotation = torch.randn(1, 7, 6), torch.randn(40, 6), torch.randn(1, 7, 1, 2, 2)
    threads = Threads(size, turns=2)
    norms = SimpleNamespace(**dict.fromkeys(("norm_q", "norm_k"), torch.nn.RMSNorm(4)))

    def of_rank(rank: int) -> tuple[torch.Tensor, list[str]]:
        noted: list[str] = []
        group = threads.of_rank(rank)
        begin = group.begin_exchange
        group.begin_exchange = lambda *given: noted.append("sent") or begin(*given)
        shares = TokenShares(group, [0, 7, 0])
        given = BlockInputs(shares, shares.own_of_all(rotation), None)
        into = Multiplied(weight, noted)
        part = attention_beside_mlp(norms, into, None, lambda *both: torch.cat(both, dim=2))
        ((_, found),) = part(shares.own_of_all(normed), given)
        return found, noted

    with ThreadPoolExecutor(size) as pool:
        founds, noted = zip(*pool.map(of_rank, range(size)), strict=True)
    assert all(of_rank[: len(order)] == order for of_rank in noted)
    features = (normed @ weight.T).split((24, 16), dim=2)
    heads = rotated_heads([heads_of(features[0], norms.norm_q, norms.norm_k)], rotation, NORM_EPS)
    expected = torch.cat((attention(*heads), features[1]), dim=2)
    torch.testing.assert_close(torch.cat(founds, dim=1), expected)
