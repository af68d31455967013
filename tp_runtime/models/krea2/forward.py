"""Krea 2's arithmetic: ComfyUI's ``SingleStreamDiT._forward`` (0.33, comfy/ldm/krea2/model.py).

Shapes: B batch, C latent channels, H W latent size, L tokens, D model width, N heads on this rank
and N' of keys and values, K head width; S streams with a modulation of their own: all tokens, and
references if they are at time 0.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...gpu.epilogue import Epilogue, Product
from ...gpu.graphs import fused
from ...sharding.plan import Split
from ..family import Sizes
from ..forward import Conditioning, ShardedForward
from ..layers import (
    attention,
    embedded_time,
    first_norms,
    project,
    rms_norm,
    rope_rotation,
    rotated_heads,
    silu_gate,
    spread_heads,
    with_time_zero,
)
from ..pictures import (
    AT_TIME_ZERO,
    counted,
    embedded_references,
    grid_positions,
    pack_patches,
    patch_grid,
    unpack_patches,
)
from ..token_shares import TokenShares
from .family import FAMILY, PATCH

NORM_EPS = 1e-5
ROPE_THETA = 1000.0


@fused
def _gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return x * F.sigmoid(gate)


def _weights(norms: Sequence[Any]) -> torch.Tensor:
    """(norms, D) fp32, of norms whose files have how far their weights are from one."""
    return 1 + torch.stack([norm.weight for norm in norms]).float()


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

    @classmethod
    def build(cls, sizes: Sizes) -> nn.Module:
        """A block's modulation is one row, as in ComfyUI's file."""
        model: Any = super().build(sizes)
        for block in model.transformer_blocks:
            block.scale_shift_table = nn.Parameter(block.scale_shift_table.flatten())
        module: nn.Module = model
        return module

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str | None = None,
    ) -> Conditioning:
        """``text`` (B, L, D); ``rotation`` of text, image and references; ``references`` (B, L, D)
        or None, and whether they are at time 0 (``zero_time``).

        Without a method ComfyUI does not look at the references.
        """
        references = ref_latents if ref_latents_method is not None else ()
        grids = [
            grid_positions(index, *(counted(length, x) for length in patch_grid(picture)))
            for index, picture in enumerate((x, *references))
        ]
        positions = torch.cat((x.new_zeros(context.shape[1], 3, dtype=torch.float32), *grids))
        return {
            "text": self._text(context),
            "rotation": rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA),
            "references": embedded_references(self.model.img_in, references, _packed),
            # Any other method only says that references are looked at.
            "zero_time": ref_latents_method == AT_TIME_ZERO and bool(references),
        }

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rotation: torch.Tensor,
        references: torch.Tensor | None = None,
        zero_time: bool = False,
    ) -> torch.Tensor:
        """(B, C, 1, H, W) → the same."""
        model, batch, blocks = self.model, x.shape[0], self.model.transformer_blocks
        image = model.img_in(_packed(x))
        streams = (text, image) if references is None else (text, image, references)
        shares, tokens = self.shared(*streams)
        time = embedded_time(self._time, with_time_zero(timesteps, zero_time), x.dtype)
        time = time.unflatten(0, (-1, batch))  # (S, B, D)
        # Of attention and MLP: scale and shift of the norm before it, and its gate.
        shared = model.time_mod_proj(_gelu(time)).unflatten(-1, (2, 3, -1))
        own = torch.stack([block.scale_shift_table for block in blocks]).unflatten(-1, (2, 3, -1))
        modulation = shared + own[:, None, None]  # (blocks, S, B, 2, 3, D)
        rows = [part.unbind(2) for block in modulation for part in block.unbind(2)]
        last = time[:1, :, None] + model.final_layer.scale_shift_table  # (1, B, 2, D)
        scales_and_shifts = [(scale, shift) for scale, shift, _ in rows]
        scales_and_shifts.append(last.expand(len(time), -1, -1, -1).unbind(2))
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
        weights = _weights([*norms, model.final_layer.norm])
        normed = self._run_blocks(
            blocks,
            self.sizes.heads[1],
            tokens,
            [
                _rms(weight, *of, num_late=shares.own_length(2) if zero_time else 0)
                for weight, of in zip(weights, scales_and_shifts, strict=True)
            ],
            [gate for _, _, gate in rows],
            shares.own_of_all(rotation),
            shares,
        )
        found = model.final_layer.linear(shares.whole(normed, 1))
        return unpack_patches(found, x.shape[-2:]).unsqueeze(2)

    def _time(self, sinusoids: torch.Tensor) -> torch.Tensor:
        embed = self.model.time_embed
        time: torch.Tensor = embed.linear_2(_gelu(embed.linear_1(sinusoids)))
        return time

    def _text(self, context: torch.Tensor) -> torch.Tensor:
        """What the text encoder's layers say of each token, fused: (B, L, layers·d) → (B, L, D)."""
        fusion, embed = self.model.text_fusion, self.model.txt_in
        layers, tokens = fusion.layerwise_blocks, fusion.refiner_blocks
        # A copy, since the blocks change it.
        of_tokens = context.unflatten(-1, (self.sizes.num_text_layers, -1)).flatten(0, 1).clone()
        # One token's layers look at each other, and then the tokens.
        kv_heads, no_norm = self.sizes.text_heads[1], Epilogue(NORM_EPS)
        found = self._run_blocks(layers, kv_heads, of_tokens, [*_norms_of(layers), no_norm])
        found = fusion.projector(found.unflatten(0, context.shape[:2]).transpose(2, 3)).squeeze(-1)
        last = _rms(_weights([embed.norm])[0])
        normed = self._run_blocks(tokens, kv_heads, found, [*_norms_of(tokens), last])
        text: torch.Tensor = embed.linear_2(project(embed.linear_1, normed, gelu=True))
        return text

    def _run_blocks(
        self,
        blocks: Sequence[Any],
        kv_heads: Split,
        tokens: torch.Tensor,
        norms: Sequence[Epilogue],
        gates: Sequence[torch.Tensor | None] | None = None,
        rotation: torch.Tensor | None = None,
        shares: TokenShares | None = None,
    ) -> torch.Tensor:
        """Tokens (B, L, D) after all blocks and the last norm.

        ``norms``: before each attention and each MLP, and the last. ``gates``: (S, B, D), of each
        attention and MLP. ``shares``: of which these are the rank's; None: these are all.
        """
        attends = [block.attn for block in blocks]
        of_heads = _weights([norm for one in attends for norm in (one.norm_q, one.norm_k)])
        parts: list[Callable[[torch.Tensor], Product]] = []
        for attend, block, own in zip(attends, blocks, of_heads.unflatten(0, (-1, 2)), strict=True):
            parts += (
                partial(_attend, attend, own, kv_heads, rotation, shares),
                partial(_feed_forward, block.ff),
            )
        num_late = norms[0].num_late
        streams = tokens.tensor_split((-num_late,), dim=1) if num_late else (tokens,)
        normed = first_norms(streams, norms[0])
        for part, gate, norm in zip(parts, gates or [None] * len(parts), norms[1:], strict=True):
            tokens, normed = self.join([part(normed)], tokens, norm._replace(gate=gate))
        return normed


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _packed(x: torch.Tensor) -> torch.Tensor:
    return pack_patches(x.squeeze(2), PATCH)


def _rms(
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    num_late: int = 0,
) -> Epilogue:
    """An RMS norm with a weight (D,) in fp32, and its scale and shift (S, B, D), if any."""
    return Epilogue(NORM_EPS, None, "rms", scale, shift, weight, num_late=num_late)


def _norms_of(blocks: Sequence[Any]) -> list[Epilogue]:
    """The norms of blocks without modulation."""
    norms = [norm for block in blocks for norm in (block.norm1, block.norm2)]
    return [_rms(weight) for weight in _weights(norms)]


def _attend(
    module: Any,
    norms: torch.Tensor,
    kv_heads: Split,
    rotation: torch.Tensor | None,
    shares: TokenShares | None,
    normed: torch.Tensor,
) -> Product:
    """Attention with its gate; returns what is left to project. ``norms`` (2, K): of q and k."""
    linear = module.to_qkv_gate
    counts = [width // kv_heads.unit for width in linear.output_partition_sizes[:3]]
    heads = project(linear, normed).unflatten(-1, (-1, kv_heads.unit))
    qkv, gate = heads.split((sum(counts), counts[0]), dim=2)
    if rotation is None:
        q, k, v = qkv.split(counts, dim=2)
        q, k = (rms_norm(one, norm, NORM_EPS) for one, norm in zip((q, k), norms, strict=True))
    else:
        q, k, v = rotated_heads([(qkv, *norms)], rotation, NORM_EPS, counts[1])
    sharers = kv_heads.sharers(linear.tp_rank, linear.tp_size)
    if len(set(sharers)) > 1:
        k, v = spread_heads(k, sharers), spread_heads(v, sharers)
    found = attention(q, k, v) if shares is None else shares.attention(q, k, v)
    return module.to_out[0], _gated(found, gate.flatten(2))


def _feed_forward(module: Any, normed: torch.Tensor) -> Product:
    return module.down, silu_gate(project(module.gate_up, normed))
