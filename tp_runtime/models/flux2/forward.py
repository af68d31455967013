"""FLUX.2's arithmetic: ComfyUI's ``Flux._forward`` with ``global_modulation`` (0.3.75, and 0.33 for
references at time 0; comfy/ldm/flux/model.py). What it shares with FLUX.1 is in that one's module.

Shapes: B batch, C channels, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...gpu.epilogue import Product
from ..dual_stream import (
    NORM_EPS,
    Block,
    BlockInputs,
    BlockName,
    DualStreamForward,
    FeedForward,
    check_method,
    dual_block,
    heads_of,
    pack_patches,
    run_blocks,
    skipped_blocks,
    unpack_patches,
)
from ..flux.forward import REFERENCE_METHODS, TIME_SCALE, mask_of, positions_of
from ..forward import Conditioning, option
from ..layers import rope_rotation, rotated_heads, silu_gate, timestep_embedding
from .family import FAMILY, TIME_CHANNELS

ROPE_THETA = 2000.0
PATCH = 1
REFERENCE_STEP = 10.0
_AT_ZERO = "index_timestep_zero"  # by index, and their modulation is that of time 0


class Forward(DualStreamForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

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
        """``text`` (B, L, D); ``rotation`` of text, image and references.

        If present: ``guidance`` (B, D), ``references`` (B, L, D) and whether they are at time 0
        (``zero_time``), ``mask``, and the blocks to ``skip``.
        """
        check_method(self.label, ref_latents, ref_latents_method, (*REFERENCE_METHODS, _AT_ZERO))
        method = "index" if ref_latents_method == _AT_ZERO else ref_latents_method
        options, num_text = option(transformer_options, "rope_options"), context.shape[1]
        placed = x, context, ref_latents, method, options, PATCH, REFERENCE_STEP
        positions = F.pad(positions_of(*placed), (0, 1))
        positions[:num_text, 3] = torch.arange(num_text, device=x.device)
        found = {
            "text": self.model.context_embedder(context),
            "rotation": rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA),
        }
        if guidance is not None and self.sizes.guidance:
            # Scaled in its own dtype, as ComfyUI does.
            sinusoids = timestep_embedding(TIME_SCALE * guidance, TIME_CHANNELS)
            embedder = self.model.time_guidance_embed.guidance_embedder
            found["guidance"] = embedder(sinusoids.to(x.dtype))
        if ref_latents:
            packed = torch.cat([pack_patches(one, PATCH) for one in ref_latents], dim=1)
            found["references"] = self.model.x_embedder(packed)
            found["zero_time"] = ref_latents_method == _AT_ZERO
        if attention_mask is not None:
            found["mask"] = mask_of(attention_mask, x.shape[0], len(positions))
        if skip := skipped_blocks(transformer_options):
            found["skip"] = skip
        return found

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
        model, batch = self.model, x.shape[0]
        image = model.x_embedder(pack_patches(x, PATCH))
        num_image = image.shape[1]
        if references is not None:
            image = torch.cat((image, references), dim=1)
        times = torch.cat((timesteps, timesteps * 0)) if zero_time else timesteps
        sinusoids = timestep_embedding(TIME_SCALE * times, TIME_CHANNELS)
        time = model.time_guidance_embed.timestep_embedder(sinusoids.to(x.dtype))
        time = time.unflatten(0, (-1, batch))  # (1 or 2, B, D): now, and at time 0
        activated = F.silu(time if guidance is None else time + guidance)
        # One modulation for all double blocks: of text, image and references at time 0, (2 or 3, B,
        # 6, D); and one for all single blocks, (1 or 3, B, 3, D).
        of_text = model.double_stream_modulation_txt.linear(activated[:1]).unflatten(-1, (6, -1))
        of_image = model.double_stream_modulation_img.linear(activated).unflatten(-1, (6, -1))
        of_doubles = torch.cat((of_text, of_image))
        of_singles = model.single_stream_modulation.linear(activated).unflatten(-1, (3, -1))
        if zero_time:
            of_singles = torch.cat((of_singles[:1], of_singles))
        last_norm = model.norm_out.linear(activated[:1]).unflatten(-1, (2, -1))
        blocks = [
            dual_block(
                ("double_block", i),
                of_doubles,
                block.attn,
                (_feed_forward(block.ff_context), _feed_forward(block.ff)),
            )
            for i, block in enumerate(model.transformer_blocks)
        ]
        blocks += [
            Block(("single_block", i), of_singles, ((_single(block.attn), 2),))
            for i, block in enumerate(model.single_transformer_blocks)
        ]
        num_late = image.shape[1] - num_image if zero_time else 0
        given = BlockInputs(text.shape[1], rotation, mask, limit=True, num_late=num_late)
        image = run_blocks(self, blocks, text, image, last_norm, given, skip, control)
        found = model.proj_out(image[:, :num_image])
        return unpack_patches(found, x.shape[-2], x.shape[-1], PATCH)


def _feed_forward(module: Any) -> FeedForward:
    return lambda x: (module.linear_out, silu_gate(module.linear_in(x)))


def _single(attend: Any) -> Any:
    """Attention and MLP of one stream, side by side; the part of ``Block`` that does both."""

    def compute(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        inputs = attend.to_qkv_mlp_proj
        widths = inputs.output_partition_sizes
        qkv, mlp = inputs(normed).split((sum(widths[:3]), sum(widths[3:])), dim=-1)
        heads = heads_of(qkv, attend.norm_q, attend.norm_k)
        attended = given.attention(*rotated_heads([heads], given.rotation, NORM_EPS))
        return [(attend.to_out, torch.cat((attended, silu_gate(mlp)), dim=-1))]

    return compute
