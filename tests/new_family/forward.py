"""The family's arithmetic on the ranks: what `plain.py` computes, sharded.

Shapes: B batch, C channels, T frames, L tokens, D model width, N heads on this rank, K head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from new_family.family import FAMILY
from new_family.plain import CROSS_DIM, EPS, Plain, patchify, sinusoids, unpatchify
from tp_runtime.gpu.epilogue import Epilogue, Product
from tp_runtime.models.family import Sizes
from tp_runtime.models.forward import Conditioning, ShardedForward
from tp_runtime.models.layers import HeadsOfRank, attention, normed_over_ranks


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

    @classmethod
    def build(cls, sizes: Sizes) -> nn.Module:
        """The plain module: diffusers has none."""
        return Plain(sizes)

    def condition(
        self,
        x: torch.Tensor,  # noqa: ARG002  (only its shape might matter)
        context: torch.Tensor,
    ) -> Conditioning:
        """``keys`` and ``values`` of the text in every block, (blocks, B, L, N, K)."""
        text = self.model.text_in(context)
        both = torch.stack([block.to_kv(text) for block in self.model.blocks])
        keys, values = both.unflatten(-1, (2, -1, CROSS_DIM)).unbind(3)
        return {"keys": keys, "values": values}

    def evaluate(
        self, x: torch.Tensor, timesteps: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """(B, C, T, H, W) → the same; ``timesteps`` (B, L)."""
        blocks = self.model.blocks
        tokens = self.model.patch_in(patchify(x))
        time = F.silu(self.model.time_in(sinusoids(timesteps).to(x.dtype)))
        # Of every block and token: shift, scale and gate, each (1, B, L, D).
        rows = [block.modulation(time)[None].chunk(3, dim=-1) for block in blocks]
        shift, scale, _ = rows[0]
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS) * (1 + scale[0]) + shift[0]
        for index, block in enumerate(blocks):
            norm = block.norm_cross
            after = Epilogue(EPS, rows[index][2], "layer", weight=norm.weight, bias=norm.bias)
            tokens, normed = self.join([self._attend_and_mlp(block, normed)], tokens, after)
            after = Epilogue(EPS, norm="layer")
            if index + 1 < len(blocks):
                shift, scale, _ = rows[index + 1]
                after = after._replace(shift=shift, scale=scale)
            product = self._attend_to_text(block, normed, keys[index], values[index])
            tokens, normed = self.join([product], tokens, after)
        return unpatchify(self.model.last(normed), x.shape)

    def _attend_and_mlp(self, block: Any, normed: torch.Tensor) -> Product:
        """Side by side; what is left to project."""
        q, k, v, gate, up = block.qkv_mlp(normed).split(block.qkv_mlp.output_partition_sizes, -1)
        head_dim, kv_width = self.sizes.head_dim, self.sizes.num_kv_heads * self.sizes.head_dim
        parts = (
            HeadsOfRank(q, block.norm_q.weight, self.sizes.dim, head_dim),
            HeadsOfRank(k, block.norm_k.weight, kv_width, head_dim),
        )
        q, k = normed_over_ranks(parts, EPS, self.collectives.add_up)
        attended = attention(q, k, v.unflatten(-1, (-1, head_dim)))
        return block.out, torch.cat((attended, F.silu(gate) * up), dim=-1)

    def _attend_to_text(
        self, block: Any, normed: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Product:
        q, width = block.to_q(normed), self.sizes.cross_heads * CROSS_DIM
        part = HeadsOfRank(q, block.norm_cross_q.weight, width, CROSS_DIM)
        (q,) = normed_over_ranks((part,), EPS, self.collectives.add_up)
        return block.to_out, attention(q, keys, values)
