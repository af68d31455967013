"""Z-Image (turbo and base): its files, sizes and split.

Module: diffusers' ``ZImageTransformer2DModel`` (0.42, models/transformers/transformer_z_image.py).
File: ComfyUI's ``NextDiT`` (0.3.75, comfy/ldm/lumina/model.py) with ``z_image_modulation``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ...config import MODEL_PATCHES
from ...errors import InputError
from ...sharding.parts import Shape
from ...sharding.plan import QKV, Column, MergedColumn, Replicated, Row, Split
from ...sharding.table import ALL, IMAGE, ITEM, PROMPT, Attention, Linear, Stack, Table, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..model_patch import ModelPatch

PATCH, EMBEDDER = 2, "2-1"  # and diffusers' name of this size
TIME_CHANNELS, TOKEN_MULTIPLE = 256, 32
CONTROL_REFINERS = 2  # of a ControlNet; there are as many of every published model
_QK_NORM, _UP = "layers.0.attention.q_norm.weight", "layers.0.feed_forward.w1.weight"
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
    plain_inputs: ClassVar = (MODEL_PATCHES,)
    options: ClassVar = ("rope_options",)
    # The last two go with reference latents, which are refused.
    unused_inputs: ClassVar = (
        "num_tokens",
        "control",
        "clip_text_pooled",
        "ref_contexts",
        "siglip_feats",
    )
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
        dim, patch, adaln = self.dim, 4 * self.in_channels, min(self.dim, 256)
        heads, gathered = Split(self.num_heads, self.head_dim), Column(gather=True)

        outside: tuple[Linear | Tensor, ...] = (
            Linear(f"all_x_embedder.{EMBEDDER}", "x_embedder", Replicated(), patch, dim),
            Tensor("cap_embedder.0.weight", "", (self.context_dim,)),
            Linear(_CAPTION, "", gathered, self.context_dim, dim),
            Linear("t_embedder.mlp.0", "", Column(), TIME_CHANNELS, self.time_dim),
            Linear("t_embedder.mlp.2", "", Row(), self.time_dim, adaln),
            Linear(f"{_LAST}.linear", "final_layer.linear", Replicated(), dim, patch),
            Linear(f"{_LAST}.{_SCALE}", f"final_layer.{_SCALE}", gathered, adaln, dim),
            *([Tensor("{x,cap}_pad_token", "", (1, dim))] if self.token_multiple > 1 else []),
        )
        noise, text, count = "noise_refiner", "context_refiner", self.num_refiners
        of_noise, of_all = _modulated_block(self, IMAGE), _modulated_block(self, ALL)
        refiners = Stack(noise, noise, count, of_noise, (Attention(heads, IMAGE, IMAGE),))
        layers = Stack("layers", "layers", self.num_layers, of_all, (Attention(heads),))
        stacks = refiners, Stack(text, text, count, _block(self, PROMPT)), layers
        return Table(outside, stacks, unused={"norm_final.weight": (dim,)})


@dataclass(frozen=True)
class UnionControl(ModelPatch):
    """The Fun Union ControlNets: a second, shorter row of blocks beside the model's.

    ``num_layers``: of those. ``refined``: it also adds to the refined image, and looks at it.
    """

    label = "Fun Union ControlNet"
    comfyui_patch = "ZImageControlPatch"
    comfyui_model = "ZImage_Control"
    places = ("noise_refiner", "double_block")
    settings = ("broken",)
    whole = True
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    refined: bool

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Shape]) -> "UnionControl":
        first = "control_layers.0"
        head_dim = shapes[f"{first}.attention.q_norm.weight"][0]
        return cls(
            shapes[f"{first}.attention.out.weight"][0] // head_dim,
            head_dim,
            shapes[f"{first}.feed_forward.w1.weight"][0],
            of.blocks("control_layers")(shapes),
            shapes[f"control_all_x_embedder.{EMBEDDER}.weight"][1] // 4,
            "control_noise_refiner.0.after_proj.weight" in shapes,
        )

    @property
    def dim(self) -> int:
        """Width of its tokens."""
        return self.num_heads * self.head_dim

    @cached_property
    def table(self) -> Table:
        dim, noise, layers = self.dim, "control_noise_refiner", "control_layers"
        patch, gathered = 4 * self.in_channels, Column(gather=True)
        after = Linear("after_proj", "", gathered, dim, dim, IMAGE)
        before = [layers, noise] if self.refined else [layers]
        outside = (
            Linear(f"control_all_x_embedder.{EMBEDDER}", "", Replicated(), patch, dim, IMAGE),
            *(Linear(f"{stack}.0.before_proj", "", gathered, dim, dim, IMAGE) for stack in before),
        )
        block = _modulated_block(self, IMAGE)
        of_noise = (*block, after) if self.refined else block
        stacks = Stack(noise, noise, CONTROL_REFINERS, of_noise)
        return Table(outside, (stacks, Stack(layers, layers, self.num_layers, (*block, after))))

    def check_fits(self, label: str, sizes: Sizes) -> None:
        assert isinstance(sizes, ZImageSizes)
        own = self.num_heads, self.head_dim, CONTROL_REFINERS
        if own != (sizes.num_heads, sizes.head_dim, sizes.num_refiners):
            raise InputError(
                f"The {self.label} has {self.num_heads} heads of {self.head_dim} and "
                f"{CONTROL_REFINERS} refiners; {label} has {sizes.num_heads} of {sizes.head_dim} "
                f"and {sizes.num_refiners} here. Use one made for this model."
            )


def _block(sizes: ZImageSizes | UnionControl, over: str) -> tuple[Linear | Tensor, ...]:
    """The rows of a block without a modulation."""
    dim, ffn, head, up = sizes.dim, sizes.ffn_dim, (sizes.head_dim,), MergedColumn("w13")
    heads, qkv = Split(sizes.num_heads, sizes.head_dim), 3 * (dim,)
    to = QKV("to_qkv", sizes.head_dim, sizes.num_heads, sizes.num_heads)
    norms = "{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}.weight"
    return (
        Linear("attention.{to_q,to_k,to_v}", "attention.qkv", to, dim, qkv, over, False),
        Linear("attention.to_out.0", "attention.out", Row((heads,)), dim, dim, over, False),
        Linear("feed_forward.{w1,w3}", "", up, dim, (ffn, ffn), over, False),
        Linear("feed_forward.w2", "", Row(), ffn, dim, over, False),
        Tensor("attention.norm_{q,k}.weight", "attention.{q,k}_norm.weight", head),
        Tensor(norms, "", (dim,)),
    )


def _modulated_block(sizes: ZImageSizes | UnionControl, over: str) -> tuple[Linear | Tensor, ...]:
    adaln = min(sizes.dim, 256)
    modulation = Linear("adaLN_modulation.0", "", Column(), adaln, 4 * sizes.dim, ITEM)
    return (*_block(sizes, over), modulation)


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
    shares_tokens=True,
    model_patches=(UnionControl,),
)
