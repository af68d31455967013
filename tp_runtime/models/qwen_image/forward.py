"""Qwen-Image's arithmetic: ComfyUI's ``QwenImageTransformer2DModel._forward`` (0.3.75, and 0.33 for
references at time 0, layers and masks; comfy/ldm/qwen_image/model.py).

Shapes: B batch, C latent channels, T layers, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError
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
    "index_timestep_zero": "index",  # and their modulation is that of time 0
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
        attention_mask: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        model_patches: Sequence[Mapping[str, Any]] = (),
    ) -> Conditioning:
        """``text`` (B, L, D); ``rotation`` of text, image and references.

        If present: ``references`` (B, L, D), whether they are at time 0 (``zero_time``), what is
        added to the time's embedding (``added``, (D,)), ``mask``, the blocks to ``skip``, and
        ``model_patches``.
        """
        self.check_patches(x.shape[0], self.sizes.geometry.image_tokens(x.shape), model_patches)
        asked = ref_latents_method or self._default_method
        check_method(self.label, ref_latents, asked, REFERENCE_METHODS)
        method = REFERENCE_METHODS.get(asked, "index")
        positions = _positions(x, context, ref_latents, method)
        rotation = rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA)
        text = rms_norm(context, self.model.txt_norm.weight, NORM_EPS)
        found = {
            "text": self.model.txt_in(text),
            "rotation": rotation.to(x.dtype),  # ComfyUI rotates in the model's dtype here
        }
        if ref_latents:
            packed = torch.cat([_pack_layers(latent) for latent in ref_latents], dim=1)
            found["references"] = self.model.img_in(packed)
            found["zero_time"] = asked == "index_timestep_zero"
        if self.sizes.added_time:
            # ComfyUI's nodes never ask for the other row, the one of the first picture.
            found["added"] = self.model.time_text_embed.addition_t_embedding.weight[0].clone()
        if attention_mask is not None:
            found["mask"] = _mask_of_text(attention_mask, context, len(positions), x.dtype)
        if skip := skipped_blocks(transformer_options):
            found["skip"] = skip
        if model_patches:
            found["model_patches"] = model_patches
        return found

    @property
    def _default_method(self) -> str:
        if self.sizes.added_time:
            return "negative_index"
        return "index_timestep_zero" if self.sizes.zero_time else "index"

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rotation: torch.Tensor,
        references: torch.Tensor | None = None,
        zero_time: bool = False,
        added: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        skip: Sequence[BlockName] = (),
        model_patches: Sequence[Mapping[str, Any]] = (),
        control: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, T, H, W) → the same."""
        model, batch = self.model, x.shape[0]
        image = model.img_in(_pack_layers(x))
        num_image = image.shape[1]
        if references is not None:
            image = torch.cat((image, references), dim=1)
        # Scaled after the frequencies, unlike FLUX: the order shows in the last bits.
        times = torch.cat((timesteps, timesteps * 0)) if zero_time else timesteps
        sinusoids = timestep_embedding(times, TIME_CHANNELS, scale=TIME_SCALE).to(x.dtype)
        time = model.time_text_embed.timestep_embedder(sinusoids)
        activated = F.silu(time if added is None else time + added)
        # Of both streams, the text's first: (blocks, 2, B, 6, D); 2 B rows with those of time 0.
        linears = [
            linear
            for block in model.transformer_blocks
            for linear in (block.txt_mod[1], block.img_mod[1])
        ]
        modulations = gathered_modulation(self, linears, activated, 6).unflatten(0, (-1, 2))
        if zero_time:  # of text, image and references
            now, at_zero = modulations.split(batch, dim=2)
            modulations = torch.cat((now, at_zero[:, 1:]), dim=1)
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
        scale_and_shift = model.norm_out.linear(activated[:batch]).unflatten(-1, (2, -1))
        last_norm = scale_and_shift.flip(1)[None]
        num_late = image.shape[1] - num_image if zero_time else 0
        given = BlockInputs(text.shape[1], rotation, mask, num_late=num_late)
        patches = self.block_patches(model_patches)
        image = run_blocks(self, blocks, text, image, last_norm, given, skip, control, patches)
        patches = model.proj_out(image[:, :num_image])
        layers = patches.unflatten(1, (x.shape[2], -1)).flatten(0, 1)
        found = unpack_patches(layers, x.shape[-2], x.shape[-1])
        return found.unflatten(0, (batch, -1)).transpose(1, 2)


def _pack_layers(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) → (B, L, 4·C), one layer's tokens behind another's."""
    return (
        pack_patches(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).flatten(1, 2)
    )


def _mask_of_text(
    mask: torch.Tensor, context: torch.Tensor, num_tokens: int, dtype: torch.dtype
) -> torch.Tensor:
    """What is added to the scores of the text's keys, (B, 1, 1, L): of 1 and 0, or added as it is.

    Raises InputError for another shape than (batch, tokens).
    """
    if mask.shape != context.shape[:2]:
        raise InputError(
            f"The attention mask of the conditioning has the shape {tuple(mask.shape)}; the "
            f"captions have {tuple(context.shape[:2])}."
        )
    if not mask.is_floating_point():
        mask = (mask - 1).to(dtype) * torch.finfo(dtype).max
    rest = num_tokens - context.shape[1]
    return F.pad(mask.to(dtype), (0, rest))[:, None, None]


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
    rows, columns = along(0, height), along(0, width)
    image = [grid_positions(index, rows, columns) for index in range(x.shape[2])]
    others = reference_positions(references, method, (height, width), along)
    return torch.cat([text[:, None].expand(-1, 3), *image, *others])
