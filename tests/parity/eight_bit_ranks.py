"""Ranks that send one another 8 bits, through gloo: what each got, of inputs that all know.

    python eight_bit_ranks.py RANKS FOLDER

Rank N saves `N.pt` in FOLDER. vLLM's groups are stood in for: one of all ranks is both the
tensor-parallel and the sequence group.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed import parallel_state

from support.forked_ranks import run_ranks
from tp_runtime.gpu import collectives, eight_bit
from tp_runtime.models.token_shares import dealt_out

STREAMS = [(2, 5, 33), (2, 3, 33)]  # of one sum: odd sizes, in one block each and in several
TOKENS, HEADS, WIDTH = 11, 5, 9  # of an exchange; which no count of ranks but 5 and 11 divides


class Linear(SimpleNamespace):
    """What a sum needs of a row-parallel linear: this one's product is its input and bias."""

    def __init__(self, rank: int) -> None:
        super().__init__(tp_rank=rank, bias=torch.full((33,), 0.5), quant_method=self)

    def apply(self, _linear: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.clone() if bias is None else x + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return collectives.add_up(self.apply(self, x, self.bias if self.tp_rank == 0 else None))


def inputs(rank: int) -> list[torch.Tensor]:
    """What one rank has of each stream; of the last, a NaN and an infinity at places of its own."""
    generator = torch.Generator().manual_seed(rank)
    found = [torch.randn(shape, generator=generator) for shape in STREAMS]
    found[-1][0, 0, rank], found[-1][1, 0, rank] = math.nan, math.inf
    return found


def heads() -> torch.Tensor:
    """Of all tokens (B, L, N, K)."""
    generator = torch.Generator().manual_seed(99)
    return torch.randn(2, TOKENS, HEADS, WIDTH, generator=generator)


def gathered(x: torch.Tensor, _dim: int) -> torch.Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def results(rank: int, size: int) -> dict[str, Any]:
    group = SimpleNamespace(
        world_size=size,
        rank_in_group=rank,
        device_group=dist.group.WORLD,
        all_reduce=lambda x: dist.all_reduce(x) or x,
        all_gather=gathered,
    )
    parallel_state.get_tp_group = parallel_state.get_pcp_group = lambda: group
    wire = eight_bit.EightBitCollectives(torch.device("cpu"), fast=False)
    products = [(Linear(rank), x) for x in inputs(rank)]
    lengths, counts = dealt_out(TOKENS, size), dealt_out(HEADS, size)
    mine = heads().split(lengths, 1)[rank]
    shapes = [(2, length, counts[rank], WIDTH) for length in lengths]

    def evaluate() -> dict[str, Any]:
        parts = wire.begin_exchange(mine.split(counts, 2), shapes)()
        return {"sums": wire.summed(products), "heads": torch.cat(parts, 1)}

    return {"rounds": wire.rounds, "exact": evaluate(), "fast": wire.during(evaluate)()}


def compute(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with torch.inference_mode():
        torch.save(results(rank, size), folder / f"{rank}.pt")


if __name__ == "__main__":
    run_ranks(compute)
