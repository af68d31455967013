"""Qwen-Image's arithmetic: ComfyUI's ``QwenImageTransformer2DModel._forward`` (0.3.75,
comfy/ldm/qwen_image/model.py).

Shapes: B batch, C latent channels, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..dual_stream import (
    NORM_EPS,
    BlockInputs,
    BlockName,
    DualStreamForward,
    check_method,
    dual_block,
    gathered_modulation,
    gelu_feed_forward,
    grid_positions,
    pack_patches,
    reference_positions,
    run_blocks,
    skipped_blocks,
    unpack_patches,
)
from ..forward import Conditioning
from ..layers import rms_norm, rope_rotation, timestep_embedding
from .family import FAMILY, TIME_CHANNELS

ROPE_THETA = 10000.0
TIME_SCALE = 1000.0
# ComfyUI's name → ours. It knows no "uxo" here and takes it for "offset".
REFERENCE_METHODS = {
    "index": "index",
    "negative_index": "negative_index",
    "offset": "offset",
    "uxo": "offset",
}


class Forward(DualStreamForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002  (ComfyUI ignores it, too)
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str = "index",
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``text`` (B, L, D); ``rotation`` of text, image and references.

        If present: ``references`` (B, L, D), and the blocks to ``skip``.
        """
        check_method(self.label, ref_latents, ref_latents_method, REFERENCE_METHODS)
        method = REFERENCE_METHODS.get(ref_latents_method, "index")
        positions = _positions(x, context, ref_latents, method)
        rotation = rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA)
        text = rms_norm(context, self.model.txt_norm.weight, NORM_EPS)
        found = {
            "text": self.model.txt_in(text),
            "rotation": rotation.to(x.dtype),  # ComfyUI rotates in the model's dtype here
        }
        if ref_latents:
            packed = torch.cat([pack_patches(latent[:, :, 0]) for latent in ref_latents], dim=1)
            found["references"] = self.model.img_in(packed)
        if skip := skipped_blocks(transformer_options):
            found["skip"] = skip
        return found

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rotation: torch.Tensor,
        references: torch.Tensor | None = None,
        skip: Sequence[BlockName] = (),
        control: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, 1, H, W) → the same."""
        model = self.model
        image = model.img_in(pack_patches(x[:, :, 0]))
        num_image = image.shape[1]
        if references is not None:
            image = torch.cat((image, references), dim=1)
        # Scaled after the frequencies, unlike FLUX: the order shows in the last bits.
        sinusoids = timestep_embedding(timesteps, TIME_CHANNELS, scale=TIME_SCALE).to(x.dtype)
        activated = F.silu(model.time_text_embed.timestep_embedder(sinusoids))
        # Of both streams, the text's first: (blocks, 2, B, 6, D).
        linears = [
            linear
            for block in model.transformer_blocks
            for linear in (block.txt_mod[1], block.img_mod[1])
        ]
        modulations = gathered_modulation(self, linears, activated, 6).unflatten(0, (-1, 2))
        blocks = [
            dual_block(
                ("double_block", i),
                modulation,
                block.attn,
                (gelu_feed_forward(block.txt_mlp), gelu_feed_forward(block.img_mlp)),
            )
            for i, (block, modulation) in enumerate(
                zip(model.transformer_blocks, modulations, strict=True)
            )
        ]
        scale_and_shift = model.norm_out.linear(activated).unflatten(-1, (2, -1))
        last_norm = scale_and_shift.flip(1)[None]
        given = BlockInputs(text.shape[1], rotation)
        image = run_blocks(self, blocks, text, image, last_norm, given, skip, control)
        patches = model.proj_out(image[:, :num_image])
        return unpack_patches(patches, x.shape[-2], x.shape[-1]).unsqueeze(2)


def _positions(
    x: torch.Tensor, context: torch.Tensor, references: Sequence[torch.Tensor], method: str
) -> torch.Tensor:
    """Positions (L, 3) of text, image and references.

    Every picture is centred on zero; the text counts on, on all axes, from the image's edge.
    """

    def along(start: int, size: int) -> torch.Tensor:
        steps = -(-size // 2)
        # In the latents' dtype, as ComfyUI does: bf16 rounds positions beyond 256.
        line = torch.linspace(start, start + steps - 1, steps, dtype=x.dtype, device=x.device)
        return line.float() - steps // 2

    height, width = x.shape[-2:]
    first = max(-(-width // 2) // 2, -(-height // 2) // 2)
    text = torch.arange(first, first + context.shape[1], dtype=torch.float32, device=x.device)
    image = grid_positions(0, along(0, height), along(0, width))
    others = reference_positions(references, method, (height, width), along)
    return torch.cat([text[:, None].expand(-1, 3), image, *others])
