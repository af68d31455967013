"""LTX-2's blocks: a stream of video and one of sound, which look at the caption and at each other.

Shapes: B batch, L tokens, D width of a stream, N heads on this rank, K head width, F timesteps of
an item.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ...gpu.epilogue import Epilogue, Product
from ..forward import ShardedForward
from ..layers import HeadsOfRank, attention, gelu_mlp, normed_over_ranks
from ..token_shares import TokenShares
from .guides import Guides, guided_attention
from .layers import EPS, QK_EPS, gated_heads, modulated, row_of

# Rows of the tables: the shift and the scale before an attention, an MLP and so on, and its gate.
BEFORE_ITSELF, _BEFORE_MLP, _BEFORE_CAPTION = (0, 1), (3, 4), (6, 7)
_ITSELF, _MLP, _CAPTION = 2, 5, 8
_SOUND_TO_VIDEO, _VIDEO_TO_SOUND, _CROSS = (1, 0), (3, 2), 4

Norm = dict[str, Any]  # what of an ``Epilogue`` is the norm
NORM: Norm = {"norm": "rms"}


@dataclass
class Stream:
    """The tokens (B, L, D) of one stream that this rank has, their norm, and what they are computed
    with.

    ``prefix``: of its modules' names; ``which``: its name in those of both. ``width``: of all
    ranks' heads. ``times`` (B, F, 6 or 9, D): modulation by the timesteps, of ``repeats`` tokens
    each (if of one, then of this rank's), and ``last`` (B, F, D), after the blocks. ``prompt`` (B,
    1, 2, D): of the ``caption`` (B, L', D). ``cross`` (B, F, 4, D), ``gate`` (B, 1, 1, D): where
    the streams look at each other. ``rotations`` (B or 1, L, N, K/2, 2): of its own heads, and of
    those with which they do. ``shares``: which tokens each rank has.
    """

    prefix: str
    which: str
    width: int
    head_dim: int
    tokens: torch.Tensor
    normed: torch.Tensor
    times: torch.Tensor
    last: torch.Tensor
    repeats: int
    caption: torch.Tensor
    rotations: tuple[torch.Tensor, torch.Tensor]
    shares: TokenShares
    guides: Guides | None = None
    prompt: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    gate: torch.Tensor | None = None
    _made: dict[int, Sequence[torch.Tensor]] = field(default_factory=dict)  # by their table

    def part(self, block: Any, name: str) -> Any:
        """Its module or table of that name."""
        return getattr(block, self.prefix + name)

    def row(self, block: Any, index: int) -> torch.Tensor:
        """As joins take it."""
        return self._row(self.part(block, "scale_shift_table"), self.times, index)

    def _row(self, table: torch.Tensor, of_time: torch.Tensor, index: int) -> torch.Tensor:
        """``row_of``. Those of a table are made at once where they are of one timestep, and small:
        each by itself would be a kernel of a few microseconds, of 1,500.
        """
        if of_time.shape[1] != 1:
            return row_of(table, of_time, index, self.repeats, self.shares)
        if id(table) not in self._made:
            rows = table[: of_time.shape[2]] + of_time[:, 0]
            self._made[id(table)] = rows[None].unbind(2)
        return self._made[id(table)][index]

    def norm(self, block: Any, rows: tuple[int, int]) -> Norm:
        """A norm that those rows shift and scale."""
        shift, scale = (self.row(block, index) for index in rows)
        return NORM | {"shift": shift, "scale": scale}

    def before_caption(self, block: Any) -> Norm:
        return NORM if self.prompt is None else self.norm(block, _BEFORE_CAPTION)

    def caption_gate(self, block: Any) -> torch.Tensor | None:
        return None if self.prompt is None else self.row(block, _CAPTION)

    def cross_norm(self, block: Any, rows: tuple[int, int]) -> Norm:
        """The same, where the streams look at each other."""
        assert self.cross is not None
        table = getattr(block, f"{self.which}_a2v_cross_attn_scale_shift_table")
        shift, scale = (self._row(table, self.cross, index) for index in rows)
        return NORM | {"shift": shift, "scale": scale}

    def cross_gate(self, block: Any) -> torch.Tensor:
        assert self.gate is not None
        table = getattr(block, f"{self.which}_a2v_cross_attn_scale_shift_table")
        return row_of(table[_CROSS:], self.gate, 0)

    def modulated(self, norm: Norm) -> torch.Tensor:
        """What the norm's rows make of ``normed``."""
        return modulated(self.normed, norm["scale"], norm["shift"])


@dataclass
class Look:
    """One attention: of queries, keys and values (B, L, N·K) by the modules of ``attend``.

    ``gates`` (B, L, N): the logits of its heads' gates. ``rotations``: of queries and of keys.
    ``shares``: of queries that look at tokens which the ranks share, and of these; None: every rank
    has all that is looked at.
    """

    attend: Any
    width: int
    head_dim: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor | None
    rotations: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    mask: torch.Tensor | None = None
    guides: Guides | None = None
    shares: tuple[TokenShares, TokenShares] | None = None

    def attended(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """The result (B, L, N·K); queries and keys are normed."""
        v = self.v.unflatten(-1, (-1, self.head_dim))
        attend: Callable[..., torch.Tensor] = attention
        mask: torch.Tensor | Guides | None = self.mask
        if self.guides is not None:
            attend, mask = guided_attention, self.guides
        if self.shares is None:
            return attend(q, k, v, mask)
        of_queries, of_keys = self.shares
        other = None if of_keys is of_queries else of_keys
        return of_queries.attention(q, k, v, mask, of_keys=other, attend=attend)

    def product(self, attended: torch.Tensor) -> Product:
        """What is left to project."""
        if self.gates is not None:
            attended = gated_heads(attended, self.gates, self.head_dim)
        return self.attend.to_out[0], attended


class StreamsForward(ShardedForward):
    """A forward whose blocks have a stream of sound, if there is any, and one of video."""

    def run_block(
        self,
        block: Any,
        streams: Sequence[Stream],
        following: Sequence[Norm],
        mask: torch.Tensor | None,
        directions: tuple[bool, bool],
        plain: bool,
    ) -> None:
        """Changes ``tokens`` and ``normed`` of the streams, the last of which is the video.

        ``following``: each stream's norm after the block. ``mask``: of the caption. ``directions``:
        whether the video looks at the sound, and the sound at the video. ``plain``: what a stream
        sees of itself is its values as they are.
        """
        # A join's norm lies where the next one's will: it is used up before, or copied.
        looks = [
            at_itself(
                stream.part(block, "attn1"),
                stream.width,
                stream.head_dim,
                stream.normed,
                stream.rotations[0],
                stream.guides,
                stream.shares,
            )
            for stream in streams
        ]
        products = [look.product(look.v) for look in looks] if plain else self.attend(looks)
        looks = []
        for stream, product in zip(streams, products, strict=True):
            gate = stream.row(block, _ITSELF)
            self._join(stream, product, gate, stream.before_caption(block))
            looks.append(self._at_caption(block, stream, mask))
        products = self.attend(looks)
        if len(streams) > 1 and any(directions):
            sound, video = streams
            products = self._at_each_other(block, sound, video, products, directions)
        else:
            for index, stream in enumerate(streams):
                norm = stream.norm(block, _BEFORE_MLP)
                self._join(stream, products[index], stream.caption_gate(block), norm)
                products[index] = gelu_mlp(stream.part(block, "ff"), stream.normed)
        for stream, product, norm in zip(streams, products, following, strict=True):
            self._join(stream, product, stream.row(block, _MLP), norm)
            if stream is not streams[-1]:
                stream.normed = stream.normed.clone()

    def _at_caption(self, block: Any, stream: Stream, mask: torch.Tensor | None) -> Look:
        attend, caption = stream.part(block, "attn2"), stream.caption
        if stream.prompt is not None:
            table = stream.part(block, "prompt_scale_shift_table")
            shift, scale = (row_of(table, stream.prompt, index) for index in (0, 1))
            caption = modulated(caption, scale, shift)
        k, v = attend.to_kv(caption).chunk(2, dim=-1)
        q, gates = attend.to_q(stream.normed), _gates(attend, stream.normed)
        return Look(attend, stream.width, stream.head_dim, q, k, v, gates, mask=mask)

    def _at_each_other(
        self,
        block: Any,
        sound: Stream,
        video: Stream,
        products: Sequence[Product],
        directions: tuple[bool, bool],
    ) -> list[Product]:
        """After the attention to the caption: the products of both MLPs."""
        to_video, to_sound = directions
        from_sound, from_video = block.audio_to_video_attn, block.video_to_audio_attn
        sizes = sound.width, sound.head_dim
        self._join(sound, products[0], sound.caption_gate(block), NORM)
        if to_video:
            given = sound.modulated(sound.cross_norm(block, _SOUND_TO_VIDEO))
            k, v = from_sound.to_kv(given).chunk(2, dim=-1)
        if to_sound:
            asking = sound.modulated(sound.cross_norm(block, _VIDEO_TO_SOUND))
            q, gates = from_video.to_q(asking), _gates(from_video, asking)
        else:
            sound_mlp = gelu_mlp(block.audio_ff, sound.modulated(sound.norm(block, _BEFORE_MLP)))
        norm = video.cross_norm(block, _SOUND_TO_VIDEO) if to_video else NORM
        self._join(video, products[1], video.caption_gate(block), norm)
        if to_video:
            rotations = video.rotations[1], sound.rotations[1]
            own, logits = from_sound.to_q(video.normed), _gates(from_sound, video.normed)
            sharing = video.shares, sound.shares
            look = Look(from_sound, *sizes, own, k, v, logits, rotations, shares=sharing)
            (product,) = self.attend([look])
            norm = NORM if to_sound else video.norm(block, _BEFORE_MLP)
            self._join(video, product, video.cross_gate(block), norm)
        if not to_sound:
            return [sound_mlp, gelu_mlp(block.ff, video.normed)]
        given = video.modulated(video.cross_norm(block, _VIDEO_TO_SOUND))
        k, v = from_video.to_kv(given).chunk(2, dim=-1)
        video_mlp = gelu_mlp(block.ff, video.modulated(video.norm(block, _BEFORE_MLP)))
        rotations = sound.rotations[1], video.rotations[1]
        sharing = sound.shares, video.shares
        look = Look(from_video, *sizes, q, k, v, gates, rotations, shares=sharing)
        (product,) = self.attend([look])
        self._join(sound, product, sound.cross_gate(block), sound.norm(block, _BEFORE_MLP))
        return [gelu_mlp(block.audio_ff, sound.normed), video_mlp]

    def attend(self, looks: Sequence[Look]) -> list[Product]:
        """Squares of all queries and keys are added up over the ranks at once."""
        halves = self.sizes.rope_type == "split"
        parts = [
            HeadsOfRank(part, norm.weight, look.width, look.head_dim, rotation, halves)
            for look in looks
            for part, norm, rotation in zip(
                (look.q, look.k),
                (look.attend.norm_q, look.attend.norm_k),
                look.rotations,
                strict=True,
            )
        ]
        normed = normed_over_ranks(parts, QK_EPS, self.collectives.add_up)
        each = zip(looks, normed[::2], normed[1::2], strict=True)
        return [look.product(look.attended(q, k)) for look, q, k in each]

    def _join(
        self, stream: Stream, product: Product, gate: torch.Tensor | None, norm: Norm
    ) -> None:
        after = Epilogue(EPS, gate, **norm)
        stream.tokens, stream.normed = self.join([product], stream.tokens, after)


def _gates(attend: Any, normed: torch.Tensor) -> torch.Tensor | None:
    logits: torch.Tensor | None = None
    if attend.to_gate_logits is not None:
        logits = attend.to_gate_logits(normed)
    return logits


def at_itself(
    attend: Any,
    width: int,
    head_dim: int,
    normed: torch.Tensor,
    rotation: torch.Tensor,
    guides: Guides | None = None,
    shares: TokenShares | None = None,
) -> Look:
    """The attention of tokens to themselves."""
    q, k, v = attend.to_qkv(normed).chunk(3, dim=-1)
    gates, rotations = _gates(attend, normed), (rotation, rotation)
    sharing = None if shares is None else (shares, shares)
    of_heads = attend, width, head_dim, q, k, v, gates, rotations
    return Look(*of_heads, guides=guides, shares=sharing)


def first_norm(
    tokens: torch.Tensor, norm: str, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """The norm of tokens (B, L, D) before the first block, as a join would give it."""
    width = tokens.shape[-1:]
    is_rms = norm == "rms"
    normed = F.rms_norm(tokens, width, eps=EPS) if is_rms else F.layer_norm(tokens, width, eps=EPS)
    return modulated(normed, scale, shift)
