"""Z-Image's arithmetic: ComfyUI's ``NextDiT._forward`` (0.3.75, comfy/ldm/lumina/model.py).

Shapes: B batch, C latent channels, H W latent size, L tokens, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...gpu.epilogue import Epilogue, Product
from ..family import Sizes
from ..forward import Conditioning, ShardedForward, option
from ..layers import (
    attention,
    first_norm,
    rms_norm,
    rope_rotation,
    rotated_heads,
    silu_gate,
    timestep_embedding,
)
from ..pictures import counted, grid_positions, pack_patches, patch_grid, unpack_patches
from ..token_shares import TokenShares
from .control import Controls, check_hint
from .family import FAMILY
from .rows import EMBEDDER

NORM_EPS = 1e-5
LAST_NORM_EPS = 1e-6

# Number of a block → what is done, in place, to the tokens (B, L, D) that it gave.
After = Mapping[int, Callable[[torch.Tensor], None]]


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

    def check_model_patches(self, x: torch.Tensor, listed: Sequence[Mapping[str, Any]]) -> None:
        for patch in listed:
            check_hint(self.label, self.model_patches[patch["name"]], patch["hint"], x)

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``caption`` (B, L, D): refined caption ``context`` (B, L, cap_feat_dim), padded.

        ``rotation`` (1, L+L', 1, K/2, 2): of the caption's and then the image's tokens.
        """
        norm, embed = self.model.cap_embedder
        caption = self._padded(embed(rms_norm(context, norm.weight, NORM_EPS)), "cap_pad_token")
        length = caption.shape[1]
        positions = self._positions(length, x, option(transformer_options, "rope_options"))
        rotation = rope_rotation(positions, self.sizes.axes_dims, self.sizes.rope_theta)
        # Each rank of a sequence group for itself: it is once a generation.
        refiner, of_caption = self.model.context_refiner, rotation[:, :length]
        caption = self.run_blocks(refiner, caption, of_caption, shares=None)
        return {"caption": caption, "rotation": rotation}

    def evaluate(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        caption: torch.Tensor,
        rotation: torch.Tensor,
        model_patches: Sequence[Mapping[str, Any]] = (),
    ) -> torch.Tensor:
        """(B, C, H, W) → the same."""
        model = self.model
        time = timestep_embedding((1.0 - timesteps) * self.sizes.time_scale)
        adaln = model.t_embedder.mlp(time.to(x.dtype))
        image = model.all_x_embedder[EMBEDDER](pack_patches(x, channels_last=True))
        shares, image = self.shared(self._padded(image, "x_pad_token"))
        refiner, layers = model.noise_refiner, model.layers
        modulation = self.modulation([*refiner, *layers], adaln)
        early, late = modulation[: len(refiner)], modulation[len(refiner) :]
        of_image = rotation[:, caption.shape[1] :]
        controls = Controls(self, model_patches, image, shares, of_image, adaln)
        after, own_rotation = controls.after_refiners(image), shares.own(of_image)
        image = self.run_blocks(refiner, image, own_rotation, shares, early, after)
        of_both = self.shares(caption.shape[1], of_image.shape[1])
        tokens = torch.cat((of_both.own_of(caption, 0), image), dim=1)
        after = controls.after_layers(image, of_both, len(layers))
        own_rotation = of_both.own_of_all(rotation)
        tokens = self.run_blocks(layers, tokens, own_rotation, of_both, late, after)
        image = of_both.whole(tokens, 1)[:, : self.sizes.geometry.image_tokens(x.shape)]
        patches = self._last_layer(image, adaln)
        return -unpack_patches(patches, x.shape[-2:], channels_last=True)

    def _padded(self, tokens: torch.Tensor, pad_token: str) -> torch.Tensor:
        """(B, L, D), with learned tokens behind them up to the token multiple."""
        missing = -tokens.shape[1] % self.sizes.token_multiple
        if not missing:
            return tokens
        pad = getattr(self.model, pad_token).expand(tokens.shape[0], missing, -1)
        return torch.cat((tokens, pad), dim=1)

    def _positions(
        self, num_caption: int, x: torch.Tensor, options: Mapping[str, float]
    ) -> torch.Tensor:
        """(L, 3): the caption counts along the first axis, the image lies at its end."""
        rows, columns = (counted(length, x) for length in patch_grid(x))
        y = rows * options.get("scale_y", 1.0) + options.get("shift_y", 0.0)
        across = columns * options.get("scale_x", 1.0) + options.get("shift_x", 0.0)
        caption = F.pad(counted(num_caption, x, 1)[:, None], (0, 2))
        image = grid_positions(num_caption + 1, y, across)
        missing = self.sizes.geometry.padded(len(image)) - len(image)
        return torch.cat((caption, F.pad(image, (0, 0, 0, missing))))

    def modulation(self, blocks: Sequence[Any], adaln: torch.Tensor) -> torch.Tensor:
        """Scale and gate of attention and MLP, (blocks, 1, B, 4, D)."""
        linears = [block.adaLN_modulation[0] for block in blocks]
        return self.modulations(linears, adaln, 4)[:, None]

    def run_blocks(
        self,
        blocks: Sequence[Any],
        tokens: torch.Tensor,
        rotation: torch.Tensor,
        shares: TokenShares | None,
        modulation: torch.Tensor | None = None,
        after: After = MappingProxyType({}),
    ) -> torch.Tensor:
        """Transformer blocks, one after another, on tokens (B, L, D).

        ``shares``: of which these are the rank's; None: these are all. ``modulation`` as
        ``modulation`` gives it; the caption's own blocks have none.
        """
        # Of each block: scale and gate of attention, scale and gate of the MLP.
        rows: list[Any] = [(None,) * 4] * len(blocks)
        if modulation is not None:
            rows = [block.unbind(2) for block in modulation]
        norms = [
            Epilogue(NORM_EPS, None, "rms", scale, weight=block.attention_norm1.weight)
            for block, (scale, *_) in zip(blocks, rows, strict=True)
        ]
        norms.append(Epilogue(NORM_EPS))
        normed = first_norm(tokens, norms[0].of_stream(0))
        for index, (block, (_, gate, scale, mlp_gate)) in enumerate(zip(blocks, rows, strict=True)):
            norm, update = block.ffn_norm1.weight, block.attention_norm2.weight
            then = Epilogue(NORM_EPS, gate, "rms", scale, weight=norm, update_weight=update)
            product = self._attend(block.attention, normed, rotation, shares)
            tokens, normed = self.join([product], tokens, then)
            then = norms[-1] if index in after else norms[index + 1]
            then = then._replace(gate=mlp_gate, update_weight=block.ffn_norm2.weight)
            mlp = block.feed_forward
            tokens, normed = self.join([(mlp.w2, silu_gate(mlp.w13(normed)))], tokens, then)
            if index in after:
                tokens = normed.clone()
                after[index](tokens)
                normed = first_norm(tokens, norms[index + 1].of_stream(0))
        return normed

    def _attend(
        self, module: Any, x: torch.Tensor, rotation: torch.Tensor, shares: TokenShares | None
    ) -> Product:
        """Attention; returns what is left to project."""
        qkv = module.to_qkv(x).unflatten(-1, (-1, self.sizes.head_dim))
        heads = rotated_heads([(qkv, module.norm_q.weight, module.norm_k.weight)], rotation, None)
        found = attention(*heads) if shares is None else shares.attention(*heads)
        return module.to_out[0], found

    def _last_layer(self, tokens: torch.Tensor, adaln: torch.Tensor) -> torch.Tensor:
        """(B, L, D) → patches (B, L, 4·C)."""
        final = self.model.all_final_layer[EMBEDDER]
        scale = final.adaLN_modulation[1](F.silu(adaln)).unsqueeze(1)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=LAST_NORM_EPS)
        patches: torch.Tensor = final.linear(normed * (1 + scale))
        return patches
