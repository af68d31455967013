"""Wan's arithmetic: ComfyUI's ``WanModel._forward`` (0.3.75, comfy/ldm/wan/model.py).

Shapes: B batch, C channels, T H W frames and size of the latent, L tokens, D model width, N heads
on this rank, K head width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...gpu.epilogue import Epilogue, Product
from ..dual_stream import BlockName, skipped_blocks
from ..family import Sizes
from ..forward import Conditioning, ShardedForward, option
from ..layers import attention, project, rms_norm_over_ranks, rope_rotation, rotate_pairs
from .family import FAMILY, PATCH, TIME_CHANNELS

EPS = 1e-6
CLIP_EPS = 1e-5
ROPE_THETA = 10000.0
AXES = (("scale_t", "shift_t"), ("scale_y", "shift_y"), ("scale_x", "shift_x"))


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

    @classmethod
    def build(cls, sizes: Sizes) -> nn.Module:
        """diffusers' module, with the convolution that it lacks where the file has one."""
        module = super().build(sizes)
        if sizes.reference_channels:  # type: ignore[attr-defined]
            kernel = PATCH[1:]
            module.ref_conv = nn.Conv2d(sizes.reference_channels, sizes.dim, kernel, kernel)  # type: ignore[attr-defined]
        return module

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        clip_fea: torch.Tensor | None = None,
        reference_latent: torch.Tensor | None = None,
        time_dim_concat: torch.Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``keys``, ``values`` (blocks, B, L, N, K) of the caption in every block; ``rotation``.

        If present: ``picture_keys`` and ``picture_values`` of CLIP's features; ``reference``
        (B, L, D), the tokens before the first frame's; ``more`` latents behind the last frame; and
        the blocks to ``skip``.
        """
        more = None if time_dim_concat is None else padded(time_dim_concat)
        uses_reference = reference_latent is not None and self.sizes.reference_channels
        frames = x.shape[2] + (0 if more is None else more.shape[2]) + bool(uses_reference)
        rope_options = option(transformer_options, "rope_options")
        positions = _positions((frames, *x.shape[3:]), rope_options, x)
        text = self._embedded(context)
        of_text = [(block.attn2.norm_k, block.attn2.to_kv) for block in self._blocks]
        found: Conditioning = {
            "rotation": rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA)
        }
        found["keys"], found["values"] = self._keys_and_values(text, of_text)
        if self.sizes.image_dim:
            # Without features ComfyUI gives these layers the caption, too.
            picture = text if clip_fea is None else self._embedded_picture(clip_fea)
            of_picture = [
                (block.attn2.norm_added_k, block.attn2.to_added_kv) for block in self._blocks
            ]
            pair = self._keys_and_values(picture, of_picture)
            found["picture_keys"], found["picture_values"] = pair
        if uses_reference:
            assert reference_latent is not None
            found["reference"] = _tokens(self.model.ref_conv(reference_latent))
        if more is not None:
            found["more"] = more
        if skip := skipped_blocks(transformer_options):
            found["skip"] = skip
        return found

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        rotation: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        picture_keys: torch.Tensor | None = None,
        picture_values: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        more: torch.Tensor | None = None,
        skip: Sequence[BlockName] = (),
    ) -> torch.Tensor:
        """(B, C, T, H, W) → (B, out_channels, T, H, W); ``timesteps`` (B,) or (B, T)."""
        model, shape = self.model, x.shape
        x = padded(x)
        if more is not None:
            x = torch.cat((x, more), dim=2)
        embedded = model.patch_embedding(x.float()).to(x.dtype)
        grid, tokens = embedded.shape[2:], _tokens(embedded)
        num_before = 0
        if reference is not None:
            num_before = reference.shape[1]
            tokens = torch.cat((reference, tokens), dim=1)
        time, modulation = self._of_time(timesteps, x.dtype)
        kept = [i for i in range(len(self._blocks)) if ("double_block", i) not in skip]
        rows = [
            _rows(self._blocks[i].scale_shift_table[None] + modulation, tokens.shape[1])
            for i in kept
        ]
        last = _rows(model.scale_shift_table[None] + time[:, :, None], tokens.shape[1])
        shift, scale = (rows[0] if rows else last)[:2]
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        normed = torch.addcmul(_of_tokens(shift), normed, 1 + _of_tokens(scale))
        for place, index in enumerate(kept):
            block = self._blocks[index]
            _, _, gate, mlp_shift, mlp_scale, mlp_gate = rows[place]
            affine = {"weight": block.norm2.weight, "bias": block.norm2.bias}
            after = Epilogue(EPS, gate, "layer", **affine)
            product = self._attend(block.attn1, normed, rotation)
            tokens, normed = self.join([product], tokens, after)
            pairs = [(keys[index], values[index])]
            if picture_keys is not None and picture_values is not None:
                pairs.append((picture_keys[index], picture_values[index]))
            after = Epilogue(EPS, None, "layer", mlp_scale, mlp_shift)
            product = self._attend_to_prompt(block.attn2, normed, pairs)
            tokens, normed = self.join([product], tokens, after)
            shift, scale = (rows[place + 1] if place + 1 < len(rows) else last)[:2]
            after = Epilogue(EPS, mlp_gate, "layer", scale, shift)
            up, down = block.ffn.net[0].proj, block.ffn.net[2]
            tokens, normed = self.join([(down, project(up, normed, gelu=True))], tokens, after)
        found = model.proj_out(normed[:, num_before:])
        return _unpatchified(found, grid)[:, :, : shape[2], : shape[3], : shape[4]]

    @property
    def _blocks(self) -> Any:
        return self.model.blocks

    def _embedded(self, context: torch.Tensor) -> torch.Tensor:
        embedder = self.model.condition_embedder.text_embedder
        return embedder.linear_2(project(embedder.linear_1, context, gelu=True))

    def _embedded_picture(self, features: torch.Tensor) -> torch.Tensor:
        embedder = self.model.condition_embedder.image_embedder
        places = embedder.pos_embed
        if places is not None:
            features = features[:, : places.shape[1]] + places[:, : features.shape[1]]
        norms = [
            lambda y, norm=norm: F.layer_norm(
                y, norm.weight.shape, norm.weight, norm.bias, CLIP_EPS
            )
            for norm in (embedder.norm1, embedder.norm2)
        ]
        up, down = embedder.ff.net[0].proj, embedder.ff.net[2]
        found: torch.Tensor = norms[1](down(F.gelu(up(norms[0](features)))))
        return found

    def _keys_and_values(
        self, tokens: torch.Tensor, layers: Sequence[tuple[Any, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L, D) → keys and values of every block (blocks, B, L, N, K)."""
        keys, values = [], []
        for norm, to_kv in layers:
            k, v = to_kv(tokens).chunk(2, dim=-1)
            (k,) = self._normed([k], [norm.weight])
            keys.append(self._heads(k))
            values.append(self._heads(v))
        return torch.stack(keys), torch.stack(values)

    def _normed(self, parts: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
        widths = len(parts) * (self.sizes.dim,)
        return rms_norm_over_ranks(parts, weights, widths, EPS, self.collectives.add_up)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.sizes.head_dim))

    def _of_time(
        self, timesteps: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding (B, F, D) of the timesteps, one or one a frame; of blocks (B, F, 6, D)."""
        embedder = self.model.condition_embedder
        time = embedder.time_embedder(_sinusoids(timesteps.flatten()).to(dtype))
        time = time.unflatten(0, (timesteps.shape[0], -1))
        return time, embedder.time_proj(F.silu(time)).unflatten(-1, (6, -1))

    def _attend(self, attend: Any, normed: torch.Tensor, rotation: torch.Tensor) -> Product:
        q, k, v = attend.to_qkv(normed).chunk(3, dim=-1)
        q, k = self._normed([q, k], [attend.norm_q.weight, attend.norm_k.weight])
        q, k = (rotate_pairs(self._heads(part), rotation) for part in (q, k))
        return attend.to_out[0], attention(q, k, self._heads(v))

    def _attend_to_prompt(
        self,
        attend: Any,
        normed: torch.Tensor,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> Product:
        (q,) = self._normed([attend.to_q(normed)], [attend.norm_q.weight])
        found = [attention(self._heads(q), k, v) for k, v in pairs]
        return attend.to_out[0], found[0] if len(found) == 1 else found[0] + found[1]


def padded(x: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, T, H, W) of a whole number of patches, padded circularly."""
    rows, columns = x.shape[-2:]
    return F.pad(x, (0, -columns % PATCH[2], 0, -rows % PATCH[1], 0, 0), mode="circular")


def _tokens(embedded: torch.Tensor) -> torch.Tensor:
    """(B, D, ...) → (B, L, D)."""
    return embedded.flatten(2).transpose(1, 2)


def _unpatchified(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """(B, L, 4·C) → (B, C, T, H, W). Features are in the order of row, column, channel."""
    count = math.prod(grid)
    patches = tokens[:, :count].unflatten(2, (*PATCH[1:], -1)).unflatten(1, tuple(grid))
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)  # B C f h p w q


def _sinusoids(times: torch.Tensor) -> torch.Tensor:
    """(n,) → (n, 256), cosines first. Frequencies are powers, as ComfyUI's: last bits show."""
    half = TIME_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = torch.outer(times.float(), torch.pow(10000, -steps / half))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def _rows(modulation: torch.Tensor, num_tokens: int) -> Sequence[torch.Tensor]:
    """(B, F, n, D) → n of (1, B, D), or of (1, B, L, D) where frames have their own timesteps."""
    frames = modulation.shape[1]
    if frames == 1:
        return modulation[:, 0][None].unbind(2)
    repeats = -(-num_tokens // frames)
    rows = modulation.repeat_interleave(repeats, dim=1)[:, :num_tokens]
    return rows[None].unbind(3)


def _of_tokens(row: torch.Tensor) -> torch.Tensor:
    """(1, B, D) or (1, B, L, D) → what broadcasts with (B, L, D)."""
    return row[0] if row.ndim == 4 else row[0][:, None]


def _positions(
    size: tuple[int, ...], options: Mapping[str, float], x: torch.Tensor
) -> torch.Tensor:
    """Positions (L, 3) of tokens by frame, row and column, rounded to the dtype of ``x``."""
    lines = []
    for length, patch, (scale, shift) in zip(size, PATCH, AXES, strict=True):
        steps = -(-length // patch)
        start = options.get(shift, 0.0)
        stop = start + (steps - 1.0) * options.get(scale, 1.0)
        lines.append(torch.linspace(start, stop, steps, dtype=x.dtype, device=x.device).float())
    return torch.cartesian_prod(*lines)
