"""What one evaluation of a transformer consists of, as data: blocks, their products, their sizes.

Client half. Each family's module describes itself so (``stages``); ``cost_model`` and the
benchmark's floor count with it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .plan import Split


@dataclass(frozen=True)
class Stage:
    """``count`` equal blocks of attention and MLP.

    ``streams``: tokens of one batch item in each stream. Streams have linears of their own and meet
    in attention. ``modulation``: (in, out) features of each stream's modulation. ``gated``: the MLP
    has two linears on the way up. ``parallel``: MLP and attention lie side by side, so that they
    share their first and last linear (FLUX.1's single blocks).
    """

    count: int
    streams: tuple[int, ...]
    width: int
    heads: Split
    ffn: Split
    modulation: tuple[int, int]
    gated: bool = False
    parallel: bool = False

    @property
    def tokens(self) -> int:
        """Of one batch item, all streams together."""
        return sum(self.streams)

    @property
    def joins(self) -> int:
        """Sums over the ranks in one block."""
        return 1 if self.parallel else 2

    def products(self, tp_size: int) -> Iterator[tuple[int, int, int]]:
        """Each linear of a block on one rank, padding included: (tokens, in, out features)."""
        heads, ffn = self.heads.local(tp_size), self.ffn.local(tp_size)
        up = 2 * ffn if self.gated else ffn
        for tokens in self.streams:
            if self.parallel:
                yield tokens, self.width, 3 * heads + up
                yield tokens, heads + ffn, self.width
            else:
                yield tokens, self.width, 3 * heads
                yield tokens, heads, self.width
                yield tokens, self.width, up
                yield tokens, ffn, self.width


def count_flops(stages: Iterable[Stage]) -> int:
    """Floating-point operations for one batch item: products and attention of all blocks."""
    return sum(
        stage.count
        * (
            sum(2 * rows * inputs * outputs for rows, inputs, outputs in stage.products(1))
            + 4 * stage.tokens**2 * stage.heads.full
        )
        for stage in stages
    )
