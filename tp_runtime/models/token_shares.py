"""Which tokens each rank of a sequence group has, and attention over all of them.

Ranks of a sequence group hold the same weights, each a stretch of every stream's tokens. Around
attention, heads and tokens change places: a rank has all its heads of its own tokens, and then all
tokens for its own share of these heads (DeepSpeed Ulysses, arXiv:2309.14509). Nothing is padded:
what does not divide is dealt out unevenly. Over a slow link the heads go in turns: while attention
of some is computed, the next are on their way, and so are the results of those before.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from . import layers


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

    def begin_exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> Callable[[], list[torch.Tensor]]:
        """The same of what attention takes and gives, which may be rounded on its way.

        Returns at once what waits for it. Every rank begins its exchanges in the same order.
        """
        ...

    def turns(self, num_bytes: int) -> int:
        """In how many exchanges the heads of an attention go, if a rank gives each other one so
        many bytes; the same on every rank.
        """
        ...

    def exchanges_beside(self) -> bool:
        """Whether a rank computes as fast while tokens of its are exchanged."""
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
        attend: Callable[..., torch.Tensor] = layers.attention,
    ) -> torch.Tensor:
        """Of this rank's tokens to all: q (B, l, N, K), k and v (B, l, N', K) → (B, l, N·K).

        ``mask``: as ``in_their_order`` gives it. ``before``: keys and values (B, P, N', K) that
        every rank has, of tokens before these. ``of_keys``: the shares of other tokens, whose keys
        and values k and v are. ``attend``: what is computed of all tokens, rank by rank, for the
        heads that are this rank's (``own_heads``), with the arguments of ``layers.attention``, as
        which all else is.
        """
        return self.begin_attention(q, k, v, mask, before, of_keys, attend)()

    def begin_attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any = None,
        before: tuple[torch.Tensor, torch.Tensor] | None = None,
        of_keys: "TokenShares | None" = None,
        attend: Callable[..., torch.Tensor] = layers.attention,
    ) -> Callable[[], torch.Tensor]:
        """Send what ``attention`` needs on its way; what is returned computes it."""
        held: list[torch.Tensor] = list(before or ())
        if self._size == 1:
            k, v = _behind(held, (k, v))
            return lambda: attend(q, k, v, mask)
        num_heads, num_kv = q.shape[2], k.shape[2]
        if num_kv != num_heads and num_kv % self._size:
            # Neighbours share a key: where a share of the heads may end between them, each has one.
            sharers = num_heads // num_kv
            k, v, *held = (part.repeat_interleave(sharers, dim=2) for part in (k, v, *held))
            num_kv = num_heads
        # What else ``attend`` was given may be of all heads of this rank.
        turns = 1
        if attend is layers.attention:
            of_all = num_heads * sum(self.lengths) + 2 * num_kv * sum((of_keys or self).lengths)
            num_bytes = q.shape[0] * of_all * q.shape[3] * q.element_size()
            turns = self._group.turns(num_bytes // self._size**2)
        kv_heads = [dealt_out(of_rank, turns) for of_rank in dealt_out(num_kv, self._size)]
        heads = [[count * num_heads // num_kv for count in of_rank] for of_rank in kv_heads]
        queries = _by_turn(q, heads)
        keys, values, *held_ones = (_by_turn(part, kv_heads) for part in (k, v, *held))
        begun = [
            self._begin(*of_turn, of_keys) for of_turn in zip(queries, keys, values, strict=True)
        ]

        def attended() -> torch.Tensor:
            back = []
            for turn, arriving in enumerate(begun):
                q, k, v = arriving()
                k, v = _behind([part[turn][self._rank] for part in held_ones], (k, v))
                found = attend(q, k, v, mask) if q.shape[2] else q.flatten(2)
                parts = found.unflatten(2, q.shape[2:]).split(self._lengths_of_ranks(), dim=1)
                back.append(self._group.begin_exchange(parts, [one.shape for one in queries[turn]]))
            of_turns = [arriving() for arriving in back]
            of_ranks = zip(*of_turns, strict=True)
            return torch.cat([part for of_rank in of_ranks for part in of_rank], dim=2).flatten(2)

        return attended

    @property
    def travel_beside(self) -> bool:
        """Whether this rank can compute something else while tokens are on their way."""
        return self._size > 1 and self._group.exchanges_beside()

    def _begin(
        self,
        q: Sequence[torch.Tensor],
        k: Sequence[torch.Tensor],
        v: Sequence[torch.Tensor],
        of_keys: "TokenShares | None",
    ) -> Callable[[], Sequence[torch.Tensor]]:
        """Give each rank its heads of this rank's tokens; its own heads of all come: q, k and v."""
        counts = [part[self._rank].shape[2] for part in (q, k, v)]
        if of_keys is None:
            together = self._begin_one([torch.cat(parts, 2) for parts in zip(q, k, v, strict=True)])
            return lambda: together().split(counts, dim=2)
        of_queries = self._begin_one(q)
        pairs = of_keys._begin_one([torch.cat(pair, dim=2) for pair in zip(k, v, strict=True)])
        return lambda: (of_queries(), *pairs().split(counts[1:], dim=2))

    def _begin_one(self, parts: Sequence[torch.Tensor]) -> Callable[[], torch.Tensor]:
        batch, _, *rest = parts[self._rank].shape
        shapes = [(batch, length, *rest) for length in self._lengths_of_ranks()]
        arriving = self._group.begin_exchange(parts, shapes)
        return lambda: torch.cat(arriving(), dim=1)


def _by_turn(x: torch.Tensor, heads: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
    """(B, L, N, K) → by turn, then by rank, these heads; ``heads``: how many, by rank."""
    parts = iter(x.split([count for of_rank in heads for count in of_rank], dim=2))
    of_ranks = [[next(parts) for _ in of_rank] for of_rank in heads]
    return [list(of_turn) for of_turn in zip(*of_ranks, strict=True)]


def _together(streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """Behind one another; a single one is not copied."""
    return streams[0] if len(streams) == 1 else torch.cat(list(streams), dim=1)


def _behind(held: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor (B, L, N, K) behind the one that is held, if any is."""
    if not held:
        return list(given)
    return [torch.cat(pair, dim=1) for pair in zip(held, given, strict=True)]
