"""FLUX.1's arithmetic: ComfyUI's ``Flux._forward`` (0.3.75, comfy/ldm/flux/model.py).

Shapes: B batch, C channels, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...gpu.graphs import optimising
from ..dual_stream import (
    DualStreamForward,
    FeedForward,
    Part,
    Streams,
    attention_beside_mlp,
    dual_blocks,
    joint_mask,
    single_blocks,
)
from ..forward import BlockName, Conditioning
from ..layers import embedded_time, gelu_mlp, rope_rotation
from ..pictures import (
    REFERENCE_METHODS,
    check_method,
    embedded_references,
    movable_positions,
    pack_patches,
    unpack_patches,
)
from .family import FAMILY

ROPE_THETA = 10000.0


class Forward(DualStreamForward):
    """See ``DualStreamForward``."""

    family = FAMILY
    limit = True

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str = "offset",
        attention_mask: torch.Tensor | None = None,
        style_tokens: Sequence[torch.Tensor] = (),
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """See the class; ``vector`` (B, D) from y, ``guidance`` (B, D) or None, and ``mask``."""
        check_method(self.label, ref_latents, ref_latents_method, REFERENCE_METHODS)
        text = self.model.context_embedder(context)
        if style_tokens:
            text = torch.cat((*reversed(style_tokens), text), dim=1)
        given = x, text.shape[1], ref_latents, ref_latents_method, transformer_options
        positions = movable_positions(*given)
        if y is None:
            y = x.new_zeros(x.shape[0], self.sizes.vector_dim)
        embedders = self.model.time_text_embed
        return {
            "text": text,
            "rotation": rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA),
            "vector": embedders.text_embedder(y[:, : self.sizes.vector_dim]),
            "guidance": self.embedded_guidance(embedders, guidance, x.dtype),
            "references": embedded_references(self.model.x_embedder, ref_latents),
            "mask": joint_mask(attention_mask, x.shape[0], len(positions)),
        }

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rotation: torch.Tensor,
        vector: torch.Tensor,
        guidance: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        skip: Sequence[BlockName] = (),
        control: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) → (B, out_channels, H, W)."""
        model = self.model
        time = embedded_time(model.time_text_embed.timestep_embedder, timesteps, x.dtype)
        time = time if guidance is None else time + guidance
        activated = F.silu(time + vector)
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        # Of both streams, the text's first, (blocks, 2, B, 6, D); of one, (blocks, 1, B, 3, D).
        norms = [norm for block in doubles for norm in (block.norm1_context, block.norm1)]
        of_doubles = self.modulations([norm.linear for norm in norms], activated, 6)
        of_singles = self.modulations([block.norm.linear for block in singles], activated, 3)
        blocks = [
            *dual_blocks(doubles, of_doubles.unflatten(0, (-1, 2)), _feed_forwards),
            *single_blocks(singles, of_singles.unflatten(0, (-1, 1)), _single),
        ]
        last_norm = model.norm_out.linear(activated).unflatten(-1, (2, -1))[None]
        streams = Streams(text, model.x_embedder(pack_patches(x)), references)
        image = self.run_blocks(blocks, last_norm, streams, rotation, mask, skip, control)
        return unpack_patches(model.proj_out(image), x.shape[-2:])


def _feed_forwards(block: Any) -> tuple[FeedForward, FeedForward]:
    return partial(gelu_mlp, block.ff_context), partial(gelu_mlp, block.ff)


def _single(block: Any) -> Part:
    return attention_beside_mlp(block.attn, block.linear1, block.proj_out, _attended_and_gelu)


def _attended_and_gelu(attended: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    if optimising():
        from ...gpu import kernels  # here, since without a GPU there may be no Triton

        return kernels.attended_and_gelu(attended, features)
    return torch.cat((attended, F.gelu(features, approximate="tanh")), dim=-1)
