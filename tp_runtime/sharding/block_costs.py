"""What one evaluation of a transformer consists of, as data: blocks, their products, their sizes.

``Table.block_costs`` makes it; ``layouts/cost_model`` and the benchmark's floor count with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from .plan import Split


@dataclass(frozen=True)
class LinearCosts:
    """A linear and the rows of one batch item that pass through it.

    ``over``: what these rows are, in the table's words. ``full``: (in, out) features; ``splits``
    deal out the ``axis`` of the weight that is split (0: out, 1: in, None: neither).
    """

    over: str
    rows: int
    full: tuple[int, int]
    splits: tuple[Split, ...]
    axis: int | None

    def local(self, tp_size: int) -> tuple[int, int]:
        """(in, out) features on each rank, padding included."""
        if self.axis is None:
            return self.full
        length = sum(split.local(tp_size) for split in self.splits)
        return (self.full[0], length) if self.axis == 0 else (length, self.full[1])


@dataclass(frozen=True)
class AttentionCosts:
    """One attention over ``heads`` of queries and ``kv_heads`` of keys, of one batch item.

    ``passing``: of the keys, those that are of tokens which pass through the block. The others are
    the same in every evaluation, or of what every rank has.
    """

    heads: Split
    kv_heads: Split
    queries: int
    keys: int
    passing: int


@dataclass(frozen=True)
class BlockCosts:
    """``count`` equal blocks. ``linears``: those that tokens pass through; ``modulations``: those
    that one row of each batch item passes through.
    """

    count: int
    linears: tuple[LinearCosts, ...]
    modulations: tuple[LinearCosts, ...]
    attentions: tuple[AttentionCosts, ...]

    @property
    def sums(self) -> tuple[LinearCosts, ...]:
        """The row-parallel linears: what they give is summed over the ranks."""
        return tuple(linear for linear in self.linears if linear.axis == 1)

    @property
    def streams(self) -> dict[str, int]:
        """The streams of tokens, which have linears of their own, and their lengths."""
        return {linear.over: linear.rows for linear in self.sums}

    @property
    def tokens(self) -> int:
        """Of one batch item, all streams together."""
        return sum(self.streams.values())

    @property
    def width(self) -> int:
        """Features of a token between two linears of a block."""
        return self.sums[0].full[1]

    @property
    def joins(self) -> int:
        """Sums over the ranks in one block, all streams in one."""
        return len(self.sums) // len(self.streams)

    @property
    def parallel(self) -> bool:
        """Whether MLP and attention lie side by side and share their last linear."""
        return any(len(linear.splits) > 1 for linear in self.sums)


def count_flops(blocks: Iterable[BlockCosts]) -> int:
    """Floating-point operations for one batch item: products and attention of all blocks."""
    return sum(
        block.count
        * (
            sum(2 * linear.rows * linear.full[0] * linear.full[1] for linear in block.linears)
            + sum(4 * one.queries * one.keys * one.heads.full for one in block.attentions)
        )
        for block in blocks
    )
