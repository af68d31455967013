"""Qwen-Image-2.1 and its Turbo: their files, sizes and split.

Module: diffusers' ``QwenImage21Transformer2DModel`` (0.42, models/transformers/
transformer_qwenimage21.py). The file of ComfyUI's class of that name (0.37, comfy/ldm/qwen_image21/
model.py) has its names, but that the published ones have the MLP's gate and up in one tensor.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

from ...sharding.plan import Column, MergedColumn, Replicated, Row, Split
from ...sharding.table import ALL, IMAGE, Attention, Linear, Stack, Table, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..rows import TIME_CHANNELS, attention, mlp

MAX_REFERENCES = 16  # of ComfyUI's node for them
_NORM = "transformer_blocks.0.attn.norm_q.weight"
_MLP = "transformer_blocks.0.img_mlp"
_FIRST_NORM = "txt_in.text_norm.weight"


@dataclass(frozen=True)
class QwenImage21Sizes(Sizes):
    """``fused``: the file has gate and up of the MLP in one tensor; a diffusers folder has not."""

    to_diffusers: ClassVar = "axes_dims_rope=axes_dims"
    to_comfyui: ClassVar = "axes_dims_rope=axes_dims"
    plain_inputs: ClassVar = ("image_slots",)
    # Where ComfyUI keeps keys and values of the prefix, and how much it rounds them. The ranks keep
    # them as they are.
    unused_inputs: ClassVar = ("qwen_image21_cache",)
    num_heads: int = size(of.heads("img_in.weight", _NORM), "num_attention_heads")
    head_dim: int = size(of.length(_NORM), "attention_head_dim")
    num_blocks: int = size(of.blocks("transformer_blocks"), "num_layers")
    in_channels: int = size(of.length("img_in.weight", 1), "in_channels")
    out_channels: int = size(of.length("proj_out.weight"), "out_channels", absent="in_channels")
    context_dim: int = size(of.length(_FIRST_NORM), "context_in_dim")
    mlp_ratio: int = size(
        lambda shapes: shapes[f"{_MLP}.out.weight"][1] // shapes["img_in.weight"][0], "mlp_ratio"
    )
    fused: bool = size(of.has(f"{_MLP}.gate_up.weight"), lambda _: False)

    @property
    def geometry(self) -> Geometry:
        channels = self.in_channels, self.out_channels
        return Geometry(*channels, downscale=16, patch=(1, 1, 1), references_once=True)

    @property
    def inputs(self) -> dict[str, Input]:
        references = self.geometry.references(at_most=MAX_REFERENCES)
        return {"context": of.captions(self.context_dim), "ref_latents": references}

    @cached_property
    def table(self) -> Table:
        dim, hidden = self.dim, self.mlp_ratio * self.dim
        heads, gathered = Split(self.num_heads, self.head_dim), Column(gather=True)
        gate_and_up, time = MergedColumn("gate_up"), "time_text_embed.timestep_embedder"
        linear = partial(Linear, bias=False)
        outside = (
            linear("img_in", "", Replicated(), self.in_channels, dim),
            *mlp("txt_in.{in,out}_layer", "", (self.context_dim, dim, dim), bias=False),
            *mlp(f"{time}.linear_{{1,2}}", "", (TIME_CHANNELS, dim, dim), bias=False),
            linear("modulation.1", "", gathered, dim, 4 * dim),
            linear("norm_out.linear", "", gathered, dim, dim),
            linear("proj_out", "", Replicated(), dim, self.out_channels),
            Tensor(_FIRST_NORM, "", (self.context_dim,)),
        )
        # Text and references pass through the blocks once a prompt; only their keys stay.
        in_the_file = "img_mlp.gate_up" if self.fused else ""
        block = (
            *attention("attn", heads, dim, over=IMAGE, bias=False),
            linear(
                "img_mlp.{gate_layer,proj}", in_the_file, gate_and_up, dim, 2 * (hidden,), IMAGE
            ),
            linear("img_mlp.out", "", Row(), hidden, dim, IMAGE),
            Tensor("attn.norm_{q,k}.weight", "", (self.head_dim,)),
        )
        stack, attentions = "transformer_blocks", (Attention(heads, IMAGE, ALL),)
        return Table(outside, (Stack(stack, stack, self.num_blocks, block, attentions),))


FAMILY = Family(
    name="qwen_image_21",
    label="Qwen-Image-2.1",
    models=("Qwen-Image-2.1", "Turbo"),
    sizes=QwenImage21Sizes,
    signature=(_FIRST_NORM, "modulation.1.weight"),
    diffusers_class="QwenImage21Transformer2DModel",
    published=QwenImage21Sizes(32, 128, 32, 64, 64, 4096, 3, True),
    small=QwenImage21Sizes(24, 16, 3, 64, 64, 64, 3, True),
    newer={_FIRST_NORM: ("Qwen-Image-2.1", "0.37")},
    text_tokens=300,
    shares_tokens=True,
)
