"""Qwen-Image's arithmetic: ComfyUI's ``QwenImageTransformer2DModel._forward`` (0.3.75, and 0.33 for
references at time 0, layers and masks; comfy/ldm/qwen_image/model.py).

Shapes: B batch, C latent channels, T layers, H W latent size, L tokens, D model width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InputError
from ..dual_stream import (
    NORM_EPS,
    DualStreamForward,
    FeedForward,
    Streams,
    dual_blocks,
)
from ..forward import BlockName, Conditioning
from ..layers import (
    TIME_SCALE,
    gelu_mlp,
    rms_norm,
    rope_rotation,
    timestep_embedding,
    with_time_zero,
)
from ..pictures import (
    AT_TIME_ZERO,
    check_method,
    counted,
    embedded_references,
    grid_positions,
    pack_patches,
    patch_grid,
    reference_positions,
    unpack_patches,
)
from .family import FAMILY

ROPE_THETA = 10000.0
# ComfyUI's name → ours. It knows no "uxo" here and takes it for "offset".
REFERENCE_METHODS = {
    "index": "index",
    AT_TIME_ZERO: "index",
    "negative_index": "negative_index",
    "offset": "offset",
    "uxo": "offset",
}


class Forward(DualStreamForward):
    """See ``DualStreamForward``."""

    family = FAMILY

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str | None = None,
    ) -> Conditioning:
        """See the class; ``mask``, and, if any, what is ``added`` (D,) to the time embedded."""
        asked = ref_latents_method or self._default_method
        check_method(self.label, ref_latents, asked, REFERENCE_METHODS)
        method = REFERENCE_METHODS.get(asked, "index")
        positions = _positions(x, context.shape[1], ref_latents, method)
        rotation = rope_rotation(positions, self.sizes.axes_dims, ROPE_THETA)
        text = rms_norm(context, self.model.txt_norm.weight, NORM_EPS)
        found: Conditioning = {
            "text": self.model.txt_in(text),
            "rotation": rotation.to(x.dtype),  # ComfyUI rotates in the model's dtype here
            "references": embedded_references(self.model.img_in, ref_latents, _pack_layers),
            "zero_time": asked == AT_TIME_ZERO and bool(ref_latents),
            "mask": _mask_of_text(attention_mask, context, len(positions), x.dtype),
        }
        if self.sizes.added_time:
            # ComfyUI's nodes never ask for the other row, the one of the first picture.
            found["added"] = self.model.time_text_embed.addition_t_embedding.weight[0].clone()
        return found

    @property
    def _default_method(self) -> str:
        if self.sizes.added_time:
            return "negative_index"
        return AT_TIME_ZERO if self.sizes.zero_time else "index"

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
        model, batch, modules = self.model, x.shape[0], self.model.transformer_blocks
        # Scaled after the frequencies, unlike FLUX: the order shows in the last bits.
        times = with_time_zero(timesteps, zero_time)
        sinusoids = timestep_embedding(times, scale=TIME_SCALE).to(x.dtype)
        time = model.time_text_embed.timestep_embedder(sinusoids)
        activated = F.silu(time if added is None else time + added)
        # Of both streams, the text's first: (blocks, 2, B, 6, D); 2 B rows with those of time 0.
        linears = [linear for block in modules for linear in (block.txt_mod[1], block.img_mod[1])]
        modulations = self.modulations(linears, activated, 6).unflatten(0, (-1, 2))
        if zero_time:  # of text, image and references
            now, at_zero = modulations.split(batch, dim=2)
            modulations = torch.cat((now, at_zero[:, 1:]), dim=1)
        blocks = dual_blocks(modules, modulations, _feed_forwards)
        scale_and_shift = model.norm_out.linear(activated[:batch]).unflatten(-1, (2, -1))
        last_norm = scale_and_shift.flip(1)[None]
        streams = Streams(text, model.img_in(_pack_layers(x)), references, zero_time)
        chosen = skip, control, model_patches
        image = self.run_blocks(blocks, last_norm, streams, rotation, mask, *chosen)
        layers = model.proj_out(image).unflatten(1, (x.shape[2], -1)).flatten(0, 1)
        found = unpack_patches(layers, x.shape[-2:])
        return found.unflatten(0, (batch, -1)).transpose(1, 2)


def _feed_forwards(block: Any) -> tuple[FeedForward, FeedForward]:
    return partial(gelu_mlp, block.txt_mlp), partial(gelu_mlp, block.img_mlp)


def _pack_layers(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) → (B, L, 4·C), one layer's tokens behind another's."""
    return (
        pack_patches(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).flatten(1, 2)
    )


def _mask_of_text(
    mask: torch.Tensor | None, context: torch.Tensor, num_tokens: int, dtype: torch.dtype
) -> torch.Tensor | None:
    """What is added to the scores of the text's keys, (B, 1, 1, L): of 1 and 0, or added as it is.

    Raises InputError for another shape than (batch, tokens).
    """
    if mask is None:
        return None
    if mask.shape != context.shape[:2]:
        raise InputError(
            f"The attention mask of the conditioning has the shape {tuple(mask.shape)}; the "
            f"captions have {tuple(context.shape[:2])}. Encode the prompt again, and leave out "
            "nodes that change its mask."
        )
    if not mask.is_floating_point():
        mask = (mask - 1).to(dtype) * torch.finfo(dtype).max
    rest = num_tokens - context.shape[1]
    return F.pad(mask.to(dtype), (0, rest))[:, None, None]


def _positions(
    x: torch.Tensor, num_text: int, references: Sequence[torch.Tensor], method: str
) -> torch.Tensor:
    """Positions (L, 3) of text, image and references.

    Every picture is centred on zero; the text counts on, on all axes, from the image's edge.
    """

    def along(start: int, size: int, _axis: str) -> torch.Tensor:
        steps = -(-size // 2)
        # In the latents' dtype, as ComfyUI does: bf16 rounds positions beyond 256.
        line = torch.linspace(start, start + steps - 1, steps, dtype=x.dtype, device=x.device)
        return line.float() - steps // 2

    size = x.shape[-2:]
    rows, columns = (along(0, *each) for each in zip(size, "yx", strict=True))
    first = max(side // 2 for side in patch_grid(x))
    text = counted(num_text, x, first)[:, None].expand(-1, 3)
    image = [grid_positions(index, rows, columns) for index in range(x.shape[2])]
    return torch.cat([text, *image, *reference_positions(references, method, size, along)])
