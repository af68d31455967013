"""Qwen-Image-2.1's arithmetic: ComfyUI's ``QwenImage21Transformer2DModel._forward`` (0.37,
comfy/ldm/qwen_image21/model.py).

One sequence: the text with reference pictures between its tokens (the prefix), then the image. A
token sees what is before it; one of a picture, all of its picture, too. The prefix is modulated as
at time 0, so it depends neither on the image nor on the time: of it, an evaluation needs only the
keys and values of every block, which are computed once a prompt.

Shapes: B batch, C latent channels, H W latent size, P tokens of the prefix, L of the image, D model
width, N heads on this rank, K head width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError
from ...gpu.epilogue import Epilogue
from ..forward import BlockName, Conditioning, ShardedForward, kept_blocks, skipped_blocks
from ..layers import (
    TIME_SCALE,
    attention,
    embedded_time,
    first_norm,
    heads_of,
    project,
    rms_norm,
    rope_rotation,
    rotated_heads,
    silu_gate,
)
from ..pictures import counted, grid_positions
from .family import FAMILY

EPS = 1e-6
ROPE_THETA = 10000.0

# Of a block: scale and gate of attention, scale and gate of the MLP, each (1, B, D).
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Of a block, those of the prefix, each (B, P, N, K).
KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the prefix, a stretch of text or a reference.

    ``mask`` (stop - start, stop): which tokens each sees; None: all up to ``stop``.
    """

    start: int
    stop: int
    mask: torch.Tensor | None


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        ref_latents: Sequence[torch.Tensor] = (),
        image_slots: Sequence[int] = (),
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``prefix``: of every block its keys and values; ``rotation`` of the image.

        ``image_slots``: before which token of the text each reference stands; those without one
        stand behind it.
        """
        num_text = context.shape[1]
        slots = self._slots(image_slots, num_text, len(ref_latents))
        positions, segments = _placed(x, slots, num_text, ref_latents)
        rotation = rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA)
        tokens = self._prefix_tokens(context, slots, ref_latents)
        num_prefix = tokens.shape[1]
        # Text and references are modulated as at time 0.
        rows = self._rows(self._time(torch.zeros(1, dtype=x.dtype, device=x.device)))
        blocks = self._blocks(skipped_blocks(transformer_options))
        prefix = self._run_prefix(blocks, tokens, rows, rotation[:, :num_prefix], segments)
        return {"prefix": prefix, "rotation": rotation[:, num_prefix:].clone()}

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        prefix: Sequence[KeysAndValues],
        rotation: torch.Tensor,
        skip: Sequence[BlockName] = (),
    ) -> torch.Tensor:
        """(B, C, H, W) → (B, out_channels, H, W)."""
        # Rounded to the model's dtype, times 1000 and then by itself, as it was trained.
        time = self._time(((timesteps * TIME_SCALE).to(x.dtype) / TIME_SCALE).to(x.dtype))
        rows = self._rows(time)
        shares, tokens = self.shared(self._embedded(x))
        rotation = shares.own(rotation)
        last_scale = self.model.norm_out.linear(F.silu(time))[None]
        blocks = self._blocks(skip)
        normed = _modulated_norm(tokens, rows[0] if blocks else last_scale)
        for block, of_prefix in zip(blocks, prefix, strict=True):
            attended = shares.attention(*self._heads(block, normed, rotation), before=of_prefix)
            scale = last_scale if block is blocks[-1] else rows[0]
            tokens, normed = self._rest_of_block(block, attended, tokens, rows, scale)
        predicted = self.model.proj_out(shares.whole(normed))
        return predicted.transpose(1, 2).unflatten(2, x.shape[-2:])

    def _slots(self, given: Any, num_text: int, count: int) -> list[int]:
        """Where each reference stands. Raises InputError for places that are none."""
        places = given if isinstance(given, list | tuple) else [given]
        slots = [*places, *[num_text] * count][:count]
        bounds = [0, *slots, num_text]
        if not all(isinstance(slot, int) for slot in slots) or sorted(bounds) != bounds:
            raise InputError(
                f"The places of {self.label}'s reference pictures in its text (the model input "
                f"image_slots) must be ascending numbers from 0 to {num_text}, the number of its "
                f"tokens; got {given}. Use the text encoder node that belongs to the model, with "
                "the same pictures."
            )
        return slots

    def _blocks(self, skip: Sequence[BlockName]) -> list[Any]:
        """Those that are not skipped."""
        return [block for _, block in kept_blocks(self.model.transformer_blocks, skip)]

    def _embedded(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, L, D)."""
        tokens: torch.Tensor = self.model.img_in(x.flatten(2).transpose(1, 2))
        return tokens

    def _time(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) in the model's dtype → (B, D)."""
        return embedded_time(self.model.time_text_embed.timestep_embedder, t.float(), t.dtype)

    def _rows(self, time: torch.Tensor) -> Rows:
        """The modulation that all blocks share."""
        scale, gate, mlp_scale, mlp_gate = self.model.modulation(time)[None].chunk(4, dim=-1)
        return scale, gate.tanh(), mlp_scale, mlp_gate.tanh()

    def _prefix_tokens(
        self, context: torch.Tensor, slots: Sequence[int], references: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """(B, P, D): the text, and each reference before the token that its slot says."""
        embed = self.model.txt_in
        normed = rms_norm(context.float(), embed.text_norm.weight.float() + 1, EPS)
        text = embed.out_layer(project(embed.in_layer, normed.to(context.dtype), gelu=True))
        parts = [text[:, start:stop] for start, stop in pairwise((0, *slots, text.shape[1]))]
        for index, reference in enumerate(references):
            parts.insert(2 * index + 1, self._embedded(reference))
        return torch.cat(parts, dim=1)

    def _run_prefix(
        self,
        blocks: Sequence[Any],
        tokens: torch.Tensor,
        rows: Rows,
        rotation: torch.Tensor,
        segments: Sequence[Segment],
    ) -> list[KeysAndValues]:
        """Those of every block. Of the last one, nothing else is needed."""
        found: list[KeysAndValues] = []
        normed = _modulated_norm(tokens, rows[0])
        for block in blocks:
            q, k, v = self._heads(block, normed, rotation)
            found.append((k, v.clone()))  # `v` is a part of what the linear gave
            if block is blocks[-1]:
                break
            attended = [
                attention(q[:, s.start : s.stop], k[:, : s.stop], v[:, : s.stop], s.mask)
                for s in segments
            ]
            after = torch.cat(attended, dim=1), tokens, rows, rows[0]
            tokens, normed = self._rest_of_block(block, *after)
        return found

    def _heads(
        self, block: Any, normed: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each (B, L, N, K)."""
        attend = block.attn
        heads = heads_of(project(attend.to_qkv, normed), attend.norm_q, attend.norm_k)
        return rotated_heads([heads], rotation, EPS)

    def _rest_of_block(
        self,
        block: Any,
        attended: torch.Tensor,
        tokens: torch.Tensor,
        rows: Rows,
        next_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows attention: the new tokens, and their norm, scaled by ``next_scale``."""
        _, gate, scale, mlp_gate = rows
        after = Epilogue(EPS, gate, "layer", scale)
        tokens, normed = self.join([(block.attn.to_out[0], attended)], tokens, after)
        product = block.img_mlp.out, silu_gate(project(block.img_mlp.gate_up, normed))
        after = Epilogue(EPS, mlp_gate, "layer", next_scale, limit=True)
        return self.join([product], tokens, after)


def _modulated_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights of (B, L, D), then scaled by (1, B, D)."""
    return first_norm(x, Epilogue(EPS, None, "layer", scale).of_stream(0))


def _placed(
    x: torch.Tensor, slots: Sequence[int], num_text: int, references: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[Segment]]:
    """Positions (P + L, 3) of the prefix and the image, and the prefix's segments.

    Tokens of text count on, on all axes. A picture keeps the count on its first axis, and lies with
    its centre at zero of the others, half a token aside where its size has another parity than the
    image's; then the count goes on by its longer side.
    """
    device, size = x.device, x.shape[-2:]
    positions: list[torch.Tensor] = []
    segments: list[Segment] = []
    count = start = 0
    for (first, last), picture in zip(
        pairwise((0, *slots, num_text)), (*references, x), strict=True
    ):
        if length := last - first:
            positions.append(counted(length, x, count)[:, None].expand(-1, 3))
            mask = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
            segments.append(Segment(start, start + length, mask))
            count, start = count + length, start + length
        rows, columns = (
            counted(n, x) - (n - n // 2) + (n % 2 - m % 2) / 2
            for n, m in zip(picture.shape[-2:], size, strict=True)
        )
        positions.append(grid_positions(count, rows, columns))
        num_tokens = len(rows) * len(columns)
        segments.append(Segment(start, start + num_tokens, None))
        count, start = count + max(len(rows), len(columns)), start + num_tokens
    return torch.cat(positions), segments[:-1]
