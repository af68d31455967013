"""Which tokens each rank of a sequence group has, and attention over all of them.

Ranks of a sequence group hold the same weights, each a stretch of every stream's tokens. Around
attention, heads and tokens change places: a rank has all its heads of its own tokens, and then all
tokens for its own share of these heads (DeepSpeed Ulysses, arXiv:2309.14509). Nothing is padded:
what does not divide is dealt out unevenly.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from .layers import attention


class SequenceGroup(Protocol):
    """The ranks that share the tokens."""

    def sequence_size(self) -> int:
        """How many there are."""
        ...

    def sequence_rank(self) -> int:
        """Which of them this one is."""
        ...

    def exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """Give each rank its part, all of one dtype; what each gives to this one, of that shape."""
        ...

    def exchange_heads(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """The same of what attention takes and gives, which may be rounded on its way."""
        ...


def dealt_out(count: int, size: int) -> list[int]:
    """How many of ``count`` each of ``size`` ranks has; the first have one more."""
    return [count // size + (rank < count % size) for rank in range(size)]


class TokenShares:
    """The stretches of a number of streams' tokens. A rank has its own of one behind another's."""

    def __init__(self, group: SequenceGroup, lengths: Sequence[int]) -> None:
        """``lengths``: tokens of each stream, of all ranks."""
        self._group, self.lengths = group, lengths
        self._size, self._rank = group.sequence_size(), group.sequence_rank()
        self._dealt = [dealt_out(length, self._size) for length in lengths]

    def own_length(self, stream: int) -> int:
        """This rank's tokens of a stream."""
        return self._dealt[stream][self._rank]

    def own_start(self, stream: int) -> int:
        """How many tokens of a stream lie before this rank's."""
        return sum(self._dealt[stream][: self._rank])

    def of_first(self, length: int) -> "TokenShares":
        """The same stretches of the first stream's first ``length`` tokens, as a stream."""
        found = TokenShares(self._group, [length])
        ends = list(accumulate(self._dealt[0], initial=0))
        found._dealt = [[min(b, length) - min(a, length) for a, b in pairwise(ends)]]
        return found

    def of_stream(self, tokens: torch.Tensor, stream: int) -> torch.Tensor:
        """What of this rank's tokens (B, l, ...) is of a stream."""
        start = sum(map(self.own_length, range(stream)))
        return tokens[:, start : start + self.own_length(stream)]

    def own(self, *streams: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) of each stream → this rank's stretches of them, one behind another's."""
        return _together([self.own_of(one, index) for index, one in enumerate(streams)])

    def own_of(self, tokens: torch.Tensor, stream: int) -> torch.Tensor:
        """(B, L, ...) of a whole stream, or of its first tokens → this rank's stretch of it."""
        start = self.own_start(stream)
        return tokens[:, start : start + self.own_length(stream)]

    def own_of_all(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) of all streams, one behind another → this rank's stretches of them."""
        return tokens if self._size == 1 else self.own(*tokens.split(list(self.lengths), dim=1))

    def _lengths_of_ranks(self) -> list[int]:
        """Tokens of all streams on each rank."""
        return [sum(of_rank) for of_rank in zip(*self._dealt, strict=True)]

    def whole(self, tokens: torch.Tensor, stream: int = 0) -> torch.Tensor:
        """Of this rank's tokens (B, l, D) of all streams, a stream (B, L, D): on every rank."""
        own = self.of_stream(tokens, stream)
        if self._size == 1:
            return own
        batch, _, *rest = own.shape
        shapes = [(batch, length, *rest) for length in self._dealt[stream]]
        return torch.cat(self._group.exchange([own] * self._size, shapes), dim=1)

    def own_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Of (B, L, N, K) the heads for which this rank computes attention."""
        dealt = dealt_out(x.shape[2], self._size)
        return x.split(dealt, dim=2)[self._rank]

    def in_their_order(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A mask over all tokens (..., L or 1, L) as attention meets them: rank by rank.

        The order is made on the mask's device: from the host, a CUDA graph could not record it.
        """
        if self._size == 1 or mask is None:
            return mask
        firsts = [sum(self.lengths[:stream]) for stream in range(len(self.lengths))]
        order = torch.cat(
            [
                torch.arange(
                    first + sum(dealt[:rank]), first + sum(dealt[: rank + 1]), device=mask.device
                )
                for rank in range(self._size)
                for first, dealt in zip(firsts, self._dealt, strict=True)
            ]
        )
        mask = mask[..., order]
        return mask if mask.shape[-2] == 1 else mask[..., order, :]

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any = None,
        before: tuple[torch.Tensor, torch.Tensor] | None = None,
        of_keys: "TokenShares | None" = None,
        attend: Callable[..., torch.Tensor] = attention,
    ) -> torch.Tensor:
        """Of this rank's tokens to all: q (B, l, N, K), k and v (B, l, N', K) → (B, l, N·K).

        ``mask``: as ``in_their_order`` gives it. ``before``: keys and values (B, P, N', K) that
        every rank has, of tokens before these. ``of_keys``: the shares of other tokens, whose keys
        and values k and v are. ``attend``: what is computed of all tokens, rank by rank, for the
        heads that are this rank's (``own_heads``), with the arguments of ``layers.attention``, as
        which all else is.
        """
        held: list[torch.Tensor] = list(before or ())
        if self._size == 1:
            k, v = _behind(held, (k, v))
            return attend(q, k, v, mask)
        batch, length, num_heads, head_dim = q.shape
        num_kv = k.shape[2]
        if num_kv != num_heads and num_kv % self._size:
            # Neighbours share a key: where a share of the heads may end between them, each has one.
            sharers = num_heads // num_kv
            k, v, *held = (part.repeat_interleave(sharers, dim=2) for part in (k, v, *held))
            num_kv = num_heads
        heads, kv_heads = dealt_out(num_heads, self._size), dealt_out(num_kv, self._size)
        parts = zip(q.split(heads, 2), k.split(kv_heads, 2), v.split(kv_heads, 2), strict=True)
        own = [kv_heads[self._rank]] * 2
        mine = heads[self._rank]
        lengths = self._lengths_of_ranks()
        if of_keys is None:
            shapes = [(batch, other, mine + sum(own), head_dim) for other in lengths]
            given = self._group.exchange_heads([torch.cat(part, dim=2) for part in parts], shapes)
            q, k, v = torch.cat(given, dim=1).split([mine, *own], dim=2)
        else:
            shapes = [(batch, other, mine, head_dim) for other in lengths]
            of_queries, *pairs = zip(*parts, strict=True)
            q = torch.cat(self._group.exchange_heads(of_queries, shapes), dim=1)
            shapes = [(batch, other, sum(own), head_dim) for other in of_keys._lengths_of_ranks()]
            together = [torch.cat(pair, dim=2) for pair in zip(*pairs, strict=True)]
            given = self._group.exchange_heads(together, shapes)
            k, v = torch.cat(given, dim=1).split(own, dim=2)
        first = sum(kv_heads[: self._rank])
        k, v = _behind([part[:, :, first : first + own[0]] for part in held], (k, v))
        found = attend(q, k, v, mask) if mine else q.flatten(2)
        found = found.unflatten(2, (mine, head_dim))
        back = [(batch, length, of_rank, head_dim) for of_rank in heads]
        given = self._group.exchange_heads(found.split(lengths, 1), back)
        return torch.cat(given, dim=2).flatten(2)


def _together(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Behind one another; a single one is not copied."""
    return streams[0] if len(streams) == 1 else torch.cat(list(streams), dim=1)


def _behind(held: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor (B, L, N, K) behind the one that is held, if any is."""
    if not held:
        return list(given)
    return [torch.cat(pair, dim=1) for pair in zip(held, given, strict=True)]
