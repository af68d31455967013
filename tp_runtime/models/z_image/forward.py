"""Z-Image's arithmetic: ComfyUI's ``NextDiT._forward`` (0.3.75, comfy/ldm/lumina/model.py).

Shapes: B batch, C latent channels, H W latent size (padded to even), L tokens, D model width,
N heads on this rank, K head width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ...gpu.epilogue import Epilogue, Product
from ...gpu.graphs import fused
from ..family import Sizes
from ..forward import Conditioning, ShardedForward, option
from ..layers import (
    attention,
    rms_norm,
    rope_rotation,
    rotated_heads,
    silu_gate,
    timestep_embedding,
)
from ..token_shares import TokenShares
from .control import Control, check_hint, patches_of
from .family import EMBEDDER, FAMILY, PATCH, TIME_CHANNELS

NORM_EPS = 1e-5


@fused
def _norm_modulate(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None
) -> torch.Tensor:
    """RMS norm of (B, L, D), then scaled by (1, B, D)."""
    normed = rms_norm(x, weight, NORM_EPS)
    return normed if scale is None else normed * (1 + scale[0][:, None])


class Forward(ShardedForward):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    family = FAMILY

    @classmethod
    def build(cls, sizes: Sizes) -> nn.Module:
        """Files of the toy have no tokens to pad with."""
        model = super().build(sizes)
        if sizes.geometry.token_multiple == 1:
            del model.x_pad_token, model.cap_pad_token
        return model

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        transformer_options: Mapping[str, Any] | None = None,
        model_patches: Sequence[Mapping[str, Any]] = (),
    ) -> Conditioning:
        """``caption`` (B, L, D): refined caption ``context`` (B, L, cap_feat_dim), padded.

        ``rotation`` (1, L+L', 1, K/2, 2): of the caption's and then the image's tokens.
        ``model_patches``, if there are some.
        """
        for patch in model_patches:
            check_hint(self.label, self.model_patches[patch["name"]], patch["hint"], x)
        if option(transformer_options, "skip_blocks"):
            raise InputError(
                f"{self.label} on the process group cannot leave blocks out (skip-layer guidance). "
                "Remove or bypass that node, or load the model with the stock 'Load Diffusion "
                "Model' node."
            )
        norm, embed = self.model.cap_embedder
        caption = embed(rms_norm(context, norm.weight, NORM_EPS))
        caption = self._pad_tokens(caption, "cap_pad_token")
        length = caption.shape[1]
        rope_options = option(transformer_options, "rope_options")
        rotation = self._rotation(length, x, rope_options)
        # Each rank of a sequence group for itself: it is once a generation.
        of_caption = caption, rotation[:, :length], None
        caption = self.run_blocks(self.model.context_refiner, *of_caption)
        found = {"caption": caption, "rotation": rotation}
        return found | ({"model_patches": model_patches} if model_patches else {})

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        caption: torch.Tensor,
        rotation: torch.Tensor,
        model_patches: Sequence[Mapping[str, Any]] = (),
    ) -> torch.Tensor:
        """(B, C, H, W) → the same."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % PATCH, 0, height % PATCH), mode="circular")
        time = timestep_embedding((1.0 - timesteps) * self.sizes.time_scale, TIME_CHANNELS)
        adaln = self.model.t_embedder.mlp(time.to(x.dtype))
        image = self._image_tokens(x)
        refiner, layers = self.model.noise_refiner, self.model.layers
        modulation = self.modulation([*refiner, *layers], adaln)
        length, of_image = caption.shape[1], self.shares(image.shape[1])
        image = of_image.own(image, 0)
        of_image_rotation = rotation[:, length:]
        own_rotation = of_image.own(of_image_rotation, 0)
        early, late = modulation[: len(refiner)], modulation[len(refiner) :]
        controls = [
            Control(self, patch, image, of_image, of_image_rotation, adaln)
            for patch in model_patches
        ]
        if controls:
            before = image.clone()
            for index, block in enumerate(refiner):
                one = early[index : index + 1]
                image = self.run_blocks([block], image, own_rotation, of_image, one).clone()
                for control in controls:
                    control.after_refiner(index, image, before)
        else:
            image = self.run_blocks(refiner, image, own_rotation, of_image, early)
        of_both = self.shares(length, rotation.shape[1] - length)
        tokens = torch.cat((of_both.own(caption, 0), image), dim=1)
        own_rotation = of_both.own_of_all(rotation)
        start = 0
        refined = image.clone() if controls else image
        # As many layers at once as there are between two that a ControlNet adds to.
        for place in sorted({place for one in controls for place in one.places(len(layers))}):
            here = slice(start, place + 1)
            tokens = self.run_blocks(
                layers[here], tokens, own_rotation, of_both, late[here]
            ).clone()
            for control in controls:
                control.after_layer(place, of_both.of_stream(tokens, 1), refined)
            start = place + 1
        tokens = self.run_blocks(layers[start:], tokens, own_rotation, of_both, late[start:])
        image = of_both.whole(of_both.of_stream(tokens, 1), 1)
        return -self._unpatchify(image, adaln, x.shape)[:, :, :height, :width]

    def _pad_tokens(self, tokens: torch.Tensor, pad_token: str) -> torch.Tensor:
        missing = -tokens.shape[1] % self.sizes.token_multiple
        if not missing:
            return tokens
        pad = getattr(self.model, pad_token).expand(tokens.shape[0], missing, -1)
        return torch.cat((tokens, pad), dim=1)

    def _rotation(
        self, caption_length: int, x: torch.Tensor, options: Mapping[str, float]
    ) -> torch.Tensor:
        """Positions: the caption counts along the first axis, the image lies at its end."""
        device, (rows, columns) = x.device, (-(-length // PATCH) for length in x.shape[-2:])
        num_image = self.sizes.geometry.padded(rows * columns)
        positions = torch.zeros(caption_length + num_image, 3, dtype=torch.float32, device=device)
        along = torch.arange(max(caption_length, rows, columns), dtype=torch.float32, device=device)
        positions[:caption_length, 0] = along[:caption_length] + 1.0
        image = positions[caption_length : caption_length + rows * columns]
        image[:, 0] = caption_length + 1
        y = along[:rows] * options.get("scale_y", 1.0) + options.get("shift_y", 0.0)
        x = along[:columns] * options.get("scale_x", 1.0) + options.get("shift_x", 0.0)
        image[:, 1] = y.repeat_interleave(columns)
        image[:, 2] = x.repeat(rows)
        return rope_rotation(positions, self.sizes.axes_dims, self.sizes.rope_theta)

    def _image_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, L, D), padded to the token multiple."""
        patches = patches_of(x)
        return self._pad_tokens(self.model.all_x_embedder[EMBEDDER](patches), "x_pad_token")

    def modulation(self, blocks: Sequence[Any], adaln: torch.Tensor) -> torch.Tensor:
        """Scale and gate of attention and MLP, (blocks, 1, B, 4, D), with one gather for all."""
        local = torch.stack([block.adaLN_modulation[0](adaln) for block in blocks])
        full = self.collectives.gather(local)[..., : 4 * self.sizes.dim]
        return full.unflatten(-1, (4, -1)).unsqueeze(1)

    def run_blocks(
        self,
        blocks: Sequence[Any],
        tokens: torch.Tensor,
        rotation: torch.Tensor,
        shares: TokenShares | None,
        modulation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transformer blocks, one after another, on tokens (B, L, D).

        ``shares``: of which these are the rank's; None: these are all. ``modulation`` as
        ``modulation`` gives it; the caption's own blocks have none.
        """
        if not blocks:
            return tokens
        # Of each block: scale and gate of attention, scale and gate of the MLP.
        rows: list[Any] = [(None,) * 4] * len(blocks)
        if modulation is not None:
            rows = [block.unbind(2) for block in modulation]
        normed = _norm_modulate(tokens, blocks[0].attention_norm1.weight, rows[0][0])
        for index, (block, (_, gate, scale, mlp_gate)) in enumerate(zip(blocks, rows, strict=True)):
            weights = {"weight": block.ffn_norm1.weight}
            weights["update_weight"] = block.attention_norm2.weight
            after = Epilogue(NORM_EPS, gate, "rms", scale, **weights)
            product = self._attend(block.attention, normed, rotation, shares)
            tokens, normed = self.join([product], tokens, after)
            after = Epilogue(NORM_EPS, mlp_gate, update_weight=block.ffn_norm2.weight)
            if index + 1 < len(blocks):
                weight, scale = blocks[index + 1].attention_norm1.weight, rows[index + 1][0]
                after = after._replace(norm="rms", scale=scale, weight=weight)
            product = self._feed_forward(block.feed_forward, normed)
            tokens, normed = self.join([product], tokens, after)
        return normed

    def _attend(
        self, module: Any, x: torch.Tensor, rotation: torch.Tensor, shares: TokenShares | None
    ) -> Product:
        """Attention; returns what is left to project."""
        qkv = module.to_qkv(x).unflatten(-1, (-1, self.sizes.head_dim))
        heads = rotated_heads([(qkv, module.norm_q.weight, module.norm_k.weight)], rotation, None)
        found = attention(*heads) if shares is None else shares.attention(*heads)
        return module.to_out[0], found

    def _feed_forward(self, module: Any, x: torch.Tensor) -> Product:
        """The MLP up to its last linear, and that."""
        return module.w2, silu_gate(module.w13(x))

    def _unpatchify(
        self, tokens: torch.Tensor, adaln: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """(B, L, D) → (B, C, H, W)."""
        final = self.model.all_final_layer[EMBEDDER]
        _, channels, height, width = shape
        rows, columns = height // PATCH, width // PATCH
        scale = final.adaLN_modulation[1](F.silu(adaln)).unsqueeze(1)
        tokens = F.layer_norm(tokens[:, : rows * columns], tokens.shape[-1:], eps=1e-6)
        patches = final.linear(tokens * (1 + scale))
        patches = patches.unflatten(1, (rows, columns)).unflatten(3, (PATCH, PATCH, channels))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
