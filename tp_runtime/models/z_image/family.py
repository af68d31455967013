"""Z-Image (turbo and base): its files, sizes and split.

Module: diffusers' ``ZImageTransformer2DModel`` (0.42, models/transformers/transformer_z_image.py).
File: ComfyUI's ``NextDiT`` (0.3.75, comfy/ldm/lumina/model.py) with ``z_image_modulation``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ...config import MODEL_PATCHES
from ...sharding.plan import Column, Replicated, Split
from ...sharding.table import ALL, IMAGE, PROMPT, Attention, Linear, Stack, Table, TableRow, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..rows import TIME_CHANNELS, mlp
from .model_patch import UnionControl
from .rows import EMBEDDER, adaln_dim, block, modulated_block

PATCH, TOKEN_MULTIPLE = 2, 32
_QK_NORM, _UP = "layers.0.attention.q_norm.weight", "layers.0.feed_forward.w1.weight"
_OF_REFERENCES = (
    "ref_contexts",
    "siglip_feats",
)  # inputs beside reference latents, which are refused
_CAPTION, _SCALE, _LAST = "cap_embedder.1", "adaLN_modulation.1", f"all_final_layer.{EMBEDDER}"


@dataclass(frozen=True)
class ZImageSizes(Sizes):
    """``token_multiple``: what learned tokens pad captions and images to; 1: nothing does."""

    rope_theta, time_scale, all_patch_size = 256.0, 1000.0, (PATCH,)
    to_diffusers: ClassVar = "dim n_kv_heads=num_heads axes_dims rope_theta all_patch_size"
    to_comfyui: ClassVar = (
        "n_heads=num_heads n_kv_heads=num_heads n_refiner_layers=num_refiners axes_dims "
        "rope_theta time_scale multiple_of=ffn_dim"
    )
    plain_inputs, options = (MODEL_PATCHES,), ("rope_options",)
    unused_inputs: ClassVar = ("num_tokens", "control", "clip_text_pooled", *_OF_REFERENCES)
    num_heads: int = size(of.heads(f"{_CAPTION}.weight", _QK_NORM), "n_heads")
    head_dim: int = size(of.length(_QK_NORM), lambda s: s["dim"] // s["n_heads"])
    ffn_dim: int = size(of.length(_UP), lambda s: int(s["dim"] / 3 * 8))
    num_layers: int = size(of.blocks("layers"), "n_layers")
    num_refiners: int = size(of.blocks("noise_refiner"), "n_refiner_layers")
    context_dim: int = size(of.length(f"{_CAPTION}.weight", 1), "cap_feat_dim")
    in_channels: int = size(of.length("x_embedder.weight", 1, 4), "in_channels")
    time_dim: int = size(of.length("t_embedder.mlp.0.weight"), lambda s: min(s["dim"], 1024))
    token_multiple: int = size(of.has("cap_pad_token", TOKEN_MULTIPLE, 1), lambda _: TOKEN_MULTIPLE)

    @property
    def axes_dims(self) -> tuple[int, ...]:
        """Features of a head that turn with caption, row and column: 32, 48, 48 of 128."""
        return self.head_dim // 4, self.head_dim // 8 * 3, self.head_dim // 8 * 3

    def for_comfyui(self) -> dict[str, Any]:
        # NextDiT rounds int(dim * multiplier) up to a multiple: this makes it ffn_dim exactly.
        ffn = {"ffn_dim_multiplier": self.ffn_dim / self.dim, "z_image_modulation": True}
        pads = {"pad_tokens_multiple": self.token_multiple if self.token_multiple > 1 else None}
        return super().for_comfyui() | ffn | pads

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.in_channels, token_multiple=self.token_multiple)

    @property
    def inputs(self) -> dict[str, Input]:
        return {"context": of.captions(self.context_dim)}

    @cached_property
    def table(self) -> Table:
        dim, patch, adaln = self.dim, 4 * self.in_channels, adaln_dim(self.dim)
        heads, gathered = Split(self.num_heads, self.head_dim), Column(gather=True)
        outside: tuple[TableRow, ...] = (
            Linear(f"all_x_embedder.{EMBEDDER}", "x_embedder", Replicated(), patch, dim),
            Tensor("cap_embedder.0.weight", "", (self.context_dim,)),
            Linear(_CAPTION, "", gathered, self.context_dim, dim),
            *mlp("t_embedder.mlp.{0,2}", "", (TIME_CHANNELS, self.time_dim, adaln)),
            Linear(f"{_LAST}.linear", "final_layer.linear", Replicated(), dim, patch),
            Linear(f"{_LAST}.{_SCALE}", f"final_layer.{_SCALE}", gathered, adaln, dim),
            *([Tensor("{x,cap}_pad_token", "", (1, dim))] if self.token_multiple > 1 else []),
        )
        noise, text, count = "noise_refiner", "context_refiner", self.num_refiners
        of_noise, of_all = modulated_block(self, IMAGE), modulated_block(self, ALL)
        refiners = Stack(noise, noise, count, of_noise, (Attention(heads, IMAGE, IMAGE),))
        layers = Stack("layers", "layers", self.num_layers, of_all, (Attention(heads),))
        stacks = refiners, Stack(text, text, count, block(self, PROMPT)), layers
        return Table(outside, stacks, unused={"norm_final.weight": (dim,)})


FAMILY = Family(
    name="z_image",
    label="Z-Image",
    models=("turbo", "base"),
    sizes=ZImageSizes,
    # Lumina 2 has the same names but for the modulation, which there follows a SiLU (index 1).
    signature=("cap_embedder.1.weight", "layers.0.adaLN_modulation.0.weight"),
    diffusers_class="ZImageTransformer2DModel",
    published=ZImageSizes(30, 128, 10240, 30, 2, 2560, 16, 1024, TOKEN_MULTIPLE),
    small=ZImageSizes(30, 16, 1280, 2, 2, 64, 16, 480, TOKEN_MULTIPLE),
    comfyui_class="ZImage",
    refused_inputs={
        "ref_latents": "reference images, for Z-Image Omni",
        "attention_mask": "a mask over the tokens of captions of different lengths",
    },
    used_with={"attention_mask": "norm_final"},  # 0.33 ignores the mask, and lacks this norm
    overflows_in_fp16=True,  # ``clamp_fp16`` of 0.33's class; 0.3.75 chooses fp16 for no file
    shares_tokens=True,
    model_patches=(UnionControl,),
)
