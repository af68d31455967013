"""FLUX.1's arithmetic: ComfyUI's ``Flux._forward`` (0.3.75, comfy/ldm/flux/model.py).

Shapes: B batch, C channels, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError
from ...gpu.epilogue import Product
from ...gpu.graphs import optimising
from ..dual_stream import (
    NORM_EPS,
    Block,
    BlockInputs,
    BlockName,
    DualStreamForward,
    check_method,
    dual_block,
    gathered_modulation,
    gelu_feed_forward,
    grid_positions,
    heads_of,
    pack_patches,
    reference_positions,
    run_blocks,
    skipped_blocks,
    unpack_patches,
)
from ..forward import Conditioning, option
from ..layers import rope_rotation, rotated_heads, timestep_embedding
from .family import FAMILY, TIME_CHANNELS

ROPE_THETA = 10000.0
TIME_SCALE = 1000.0
REFERENCE_METHODS = ("offset", "index", "uxo")


class Forward(DualStreamForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

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
        """``text`` (B, L, D); ``rotation`` of text, image and references; ``vector`` (B, D) from y.

        If present: ``guidance`` (B, D), ``references`` (B, L, D), ``mask``, and the blocks to
        ``skip``.
        """
        check_method(self.label, ref_latents, ref_latents_method, REFERENCE_METHODS)
        rope_options = option(transformer_options, "rope_options")
        text = self.model.context_embedder(context)
        if style_tokens:
            text = torch.cat((*reversed(style_tokens), text), dim=1)
        positions = positions_of(x, text, ref_latents, ref_latents_method, rope_options)
        mask = None
        if attention_mask is not None:
            mask = mask_of(attention_mask, x.shape[0], len(positions))
        if y is None:
            y = x.new_zeros(x.shape[0], self.sizes.vector_dim)
        embedders = self.model.time_text_embed
        found = {
            "text": text,
            "rotation": rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA),
            "vector": embedders.text_embedder(y[:, : self.sizes.vector_dim]),
        }
        if guidance is not None and self.sizes.guidance:
            # Scaled in its own dtype, as ComfyUI does.
            sinusoids = timestep_embedding(TIME_SCALE * guidance, TIME_CHANNELS)
            found["guidance"] = embedders.guidance_embedder(sinusoids.to(x.dtype))
        if ref_latents:
            packed = torch.cat([pack_patches(reference) for reference in ref_latents], dim=1)
            found["references"] = self.model.x_embedder(packed)
        if mask is not None:
            found["mask"] = mask
        if skip := skipped_blocks(transformer_options):
            found["skip"] = skip
        return found

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
        image = model.x_embedder(pack_patches(x))
        num_image = image.shape[1]
        if references is not None:
            image = torch.cat((image, references), dim=1)
        sinusoids = timestep_embedding(TIME_SCALE * timesteps, TIME_CHANNELS)
        time = model.time_text_embed.timestep_embedder(sinusoids.to(x.dtype))
        time = time if guidance is None else time + guidance
        activated = F.silu(time + vector)
        doubles, singles = model.transformer_blocks, model.single_transformer_blocks
        # Of both streams, the text's first, (blocks, 2, B, 6, D); of one, (blocks, 1, B, 3, D).
        norms = [norm for block in doubles for norm in (block.norm1_context, block.norm1)]
        of_doubles, of_singles = (
            gathered_modulation(self, [norm.linear for norm in these], activated, count)
            for these, count in ((norms, 6), ([block.norm for block in singles], 3))
        )
        last_norm = model.norm_out.linear(activated).unflatten(-1, (2, -1))[None]
        blocks = [
            dual_block(
                ("double_block", i),
                modulation,
                block.attn,
                (gelu_feed_forward(block.ff_context), gelu_feed_forward(block.ff)),
            )
            for i, (block, modulation) in enumerate(
                zip(doubles, of_doubles.unflatten(0, (-1, 2)), strict=True)
            )
        ]
        blocks += [
            Block(("single_block", i), modulation, ((_single(block), 2),))
            for i, (block, modulation) in enumerate(
                zip(singles, of_singles.unflatten(0, (-1, 1)), strict=True)
            )
        ]
        given = BlockInputs(text.shape[1], rotation, mask, limit=True)
        image = run_blocks(self, blocks, text, image, last_norm, given, skip, control)
        return unpack_patches(model.proj_out(image[:, :num_image]), x.shape[-2], x.shape[-1])


def _single(block: Any) -> Any:
    """Attention and MLP of one stream, side by side; the part of ``Block`` that does both."""

    def compute(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        *widths, mlp_width = block.linear1.output_partition_sizes
        qkv, mlp = block.linear1(normed).split((sum(widths), mlp_width), dim=-1)
        heads = heads_of(qkv, block.attn.norm_q, block.attn.norm_k)
        attended = given.attention(*rotated_heads([heads], given.rotation, NORM_EPS))
        return [(block.proj_out, _attended_and_gelu(attended, mlp))]

    return compute


def _attended_and_gelu(attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    if optimising():
        from ...gpu import kernels  # here, since without a GPU there may be no Triton

        return kernels.attended_and_gelu(attended, mlp)
    return torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1)


def positions_of(
    x: torch.Tensor,
    context: torch.Tensor,
    references: Sequence[torch.Tensor],
    method: str,
    options: Mapping[str, float],
    patch: int = 2,
    step: float = 1.0,
) -> torch.Tensor:
    """Positions (L, 3) of text (all zero), image and references. ``options`` move the image.

    ``patch``: latent rows and columns of a token; ``step``: from one reference to the next.
    """

    def along(start: float, size: int, scale: float = 1.0) -> torch.Tensor:
        steps = -(-size // patch)
        end = start + (steps - 1) * scale
        return torch.linspace(start, end, steps, dtype=torch.float32, device=x.device)

    height, width = x.shape[-2:]
    text = torch.zeros(context.shape[1], 3, dtype=torch.float32, device=x.device)
    y = along(options.get("shift_y", 0.0), height, options.get("scale_y", 1.0))
    x_axis = along(options.get("shift_x", 0.0), width, options.get("scale_x", 1.0))
    image = grid_positions(options.get("shift_t", 0.0), y, x_axis)
    others = reference_positions(references, method, (height, width), along, patch, step)
    return torch.cat([text, image, *others])


def mask_of(mask: torch.Tensor, batch: int, num_tokens: int) -> torch.Tensor:
    """(L, L), (B, L, L) or (B, 1, L, L) → four axes, as ComfyUI's attention understands them."""
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch)
    if not fits or mask.shape[1:] != (1, num_tokens, num_tokens):
        raise InputError(
            f"The attention mask of the conditioning has the shape {tuple(mask.shape)}; these "
            f"{batch} latents and captions are {num_tokens} tokens together."
        )
    return mask
