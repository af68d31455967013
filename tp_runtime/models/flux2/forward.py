"""FLUX.2's arithmetic: ComfyUI's ``Flux._forward`` with ``global_modulation`` (0.3.75, and 0.33 for
references at time 0; comfy/ldm/flux/model.py).

Shapes: B batch, C channels, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...gpu.epilogue import Product
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
from ..layers import embedded_time, rope_rotation, silu_gate, with_time_zero
from ..pictures import (
    AT_TIME_ZERO,
    REFERENCE_METHODS,
    check_method,
    counted,
    embedded_references,
    movable_positions,
    pack_patches,
    unpack_patches,
)
from .family import FAMILY

ROPE_THETA = 2000.0
PATCH = 1
REFERENCE_STEP = 10.0


class Forward(DualStreamForward):
    """See ``DualStreamForward``."""

    family = FAMILY
    limit = True

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        guidance: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str = "index",
        attention_mask: torch.Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """See the class; ``guidance`` (B, D) or None, and ``mask``."""
        methods = *REFERENCE_METHODS, AT_TIME_ZERO
        check_method(self.label, ref_latents, ref_latents_method, methods)
        zero_time = ref_latents_method == AT_TIME_ZERO
        method = "index" if zero_time else ref_latents_method
        num_text = context.shape[1]
        placed = x, num_text, ref_latents, method, transformer_options, PATCH, REFERENCE_STEP
        positions = F.pad(movable_positions(*placed), (0, 1))
        positions[:num_text, 3] = counted(num_text, x)
        embedders, embed = self.model.time_guidance_embed, self.model.x_embedder
        return {
            "text": self.model.context_embedder(context),
            "rotation": rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA),
            "guidance": self.embedded_guidance(embedders, guidance, x.dtype),
            "references": embedded_references(embed, ref_latents, _packed),
            "zero_time": zero_time and bool(ref_latents),
            "mask": joint_mask(attention_mask, x.shape[0], len(positions)),
        }

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rotation: torch.Tensor,
        guidance: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        zero_time: bool = False,
        mask: torch.Tensor | None = None,
        skip: Sequence[BlockName] = (),
        control: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) → (B, out_channels, H, W)."""
        model = self.model
        times = with_time_zero(timesteps, zero_time)
        time = embedded_time(model.time_guidance_embed.timestep_embedder, times, x.dtype)
        time = time.unflatten(0, (-1, x.shape[0]))  # (1 or 2, B, D): now, and at time 0
        activated = F.silu(time if guidance is None else time + guidance)
        # One modulation for all double blocks: of text, image and references at time 0, (2 or 3, B,
        # 6, D); and one for all single blocks, (1 or 3, B, 3, D).
        of_text = model.double_stream_modulation_txt.linear(activated[:1]).unflatten(-1, (6, -1))
        of_image = model.double_stream_modulation_img.linear(activated).unflatten(-1, (6, -1))
        of_doubles = torch.cat((of_text, of_image))
        of_singles = model.single_stream_modulation.linear(activated).unflatten(-1, (3, -1))
        if zero_time:
            of_singles = torch.cat((of_singles[:1], of_singles))
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        blocks = [
            *dual_blocks(doubles, [of_doubles] * len(doubles), _feed_forwards),
            *single_blocks(singles, [of_singles] * len(singles), _single),
        ]
        last_norm = model.norm_out.linear(activated[:1]).unflatten(-1, (2, -1))
        streams = Streams(text, model.x_embedder(_packed(x)), references, zero_time)
        image = self.run_blocks(blocks, last_norm, streams, rotation, mask, skip, control)
        return unpack_patches(model.proj_out(image), x.shape[-2:], PATCH)


def _packed(x: torch.Tensor) -> torch.Tensor:
    return pack_patches(x, PATCH)


def _feed_forwards(block: Any) -> tuple[FeedForward, FeedForward]:
    return partial(_feed_forward, block.ff_context), partial(_feed_forward, block.ff)


def _feed_forward(module: Any, x: torch.Tensor) -> Product:
    return module.linear_out, silu_gate(module.linear_in(x))


def _single(block: Any) -> Part:
    attend = block.attn
    return attention_beside_mlp(attend, attend.to_qkv_mlp_proj, attend.to_out, _attended_and_gated)


def _attended_and_gated(attended: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return torch.cat((attended, silu_gate(features)), dim=-1)
