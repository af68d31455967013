"""FLUX.1 (dev, schnell, Krea, Kontext, Fill, Canny, Depth): its files, sizes and split.

Module: diffusers' ``FluxTransformer2DModel`` (0.42, models/transformers/transformer_flux.py).
File: ComfyUI's ``Flux`` (0.3.75, comfy/ldm/flux/model.py).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ...config import STYLE_TOKENS
from ...sharding.plan import Column, MergedColumn, Replicated, Row, Split
from ...sharding.table import IMAGE, ITEM, TEXT, Linear, Table, TableRow, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..rows import TIME_CHANNELS, double_and_single_stacks, joint_attention, mlp

_NORM = "double_blocks.0.img_attn.norm.query_norm"
_EITHER, _LAST = f"{_NORM}.{{scale,weight}}", "final_layer.linear.weight"
_IMAGE_ATTENTION = "img_attn.qkv", "img_attn.proj"
_TEXT_ATTENTION = "txt_attn.qkv", "txt_attn.proj"


@dataclass(frozen=True)
class FluxSizes(Sizes):
    """``in_channels``: of a latent with what is concatenated to it (Fill, Canny, Depth)."""

    patch_size: ClassVar = 1  # diffusers packs patches outside of the model
    to_diffusers: ClassVar = "patch_size axes_dims_rope=axes_dims"
    to_comfyui: ClassVar = "num_heads out_channels axes_dim=axes_dims"
    plain_inputs, options = ("control", "ref_latents_method"), ("rope_options",)
    num_heads: int = size(of.heads("img_in.weight", _EITHER), "num_attention_heads")
    head_dim: int = size(of.length(_EITHER), "attention_head_dim")
    num_doubles: int = size(of.blocks("double_blocks"), "num_layers")
    num_singles: int = size(of.blocks("single_blocks"), "num_single_layers")
    in_channels: int = size(of.length("img_in.weight", 1, 4), "in_channels", times=4)
    out_channels: int = size(of.length(_LAST, 0, 4), "out_channels", 4, absent="in_channels")
    context_dim: int = size(of.length("txt_in.weight", 1), "joint_attention_dim")
    vector_dim: int = size(of.length("vector_in.in_layer.weight", 1), "pooled_projection_dim")
    guidance: bool = size(of.has("guidance_in.in_layer.weight"), "guidance_embeds", absent=False)
    norm_name: str = size(of.has(f"{_NORM}.weight", "weight", "scale"), lambda _: "scale")

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.in_channels, self.out_channels)

    @property
    def inputs(self) -> dict[str, Input]:
        captions, pooled = of.captions(self.context_dim), of.pooled_captions(self.vector_dim)
        others = {"guidance": of.GUIDANCES, "ref_latents": self.geometry.references()}
        others[STYLE_TOKENS] = of.style_tokens(self.dim)
        return {"context": captions, "y": pooled, "attention_mask": of.MASKS, **others}

    @cached_property
    def table(self) -> Table:
        dim, hidden = self.dim, 4 * self.dim
        heads, gathered = Split(self.num_heads, self.head_dim), Column(gather=True)
        norms, head = f"norm.{{query,key}}_norm.{self.norm_name}", (self.head_dim,)

        def embedder(ours: str, file: str, width: int) -> tuple[Linear, ...]:
            path = f"time_text_embed.{ours}_embedder.linear_{{1,2}}"
            return mlp(path, f"{file}.{{in,out}}_layer", (width, dim, dim))

        scale_and_shift = "final_layer.adaLN_modulation.1"
        outside = (
            Linear("x_embedder", "img_in", Replicated(), 4 * self.in_channels, dim),
            Linear("context_embedder", "txt_in", gathered, self.context_dim, dim),
            *embedder("timestep", "time_in", TIME_CHANNELS),
            *embedder("text", "vector_in", self.vector_dim),
            *(embedder("guidance", "guidance_in", TIME_CHANNELS) if self.guidance else ()),
            Linear("norm_out.linear", scale_and_shift, gathered, dim, 2 * dim, swapped=True),
            Linear("proj_out", "final_layer.linear", Replicated(), dim, 4 * self.out_channels),
        )
        double: tuple[TableRow, ...] = (
            Linear("norm1.linear", "img_mod.lin", Column(), dim, 6 * dim, ITEM),
            Linear("norm1_context.linear", "txt_mod.lin", Column(), dim, 6 * dim, ITEM),
            *joint_attention(heads, dim, _IMAGE_ATTENTION, _TEXT_ATTENTION),
            *mlp("ff.net.{0.proj,2}", "img_mlp.{0,2}", (dim, hidden, dim), IMAGE),
            *mlp("ff_context.net.{0.proj,2}", "txt_mlp.{0,2}", (dim, hidden, dim), TEXT),
            Tensor("attn.norm_{q,k}.weight", f"img_attn.{norms}", head),
            Tensor("attn.norm_added_{q,k}.weight", f"txt_attn.{norms}", head),
        )
        inside, first = "{attn.to_q,attn.to_k,attn.to_v,proj_mlp}", (*3 * (self.head_dim,), 1)
        single = (
            Linear("norm.linear", "modulation.lin", Column(), dim, 3 * dim, ITEM),
            Linear(inside, "linear1", MergedColumn("linear1", first), dim, (dim, dim, dim, hidden)),
            Linear("proj_out", "linear2", Row((heads, Split(hidden))), dim + hidden, dim),
            Tensor("attn.norm_{q,k}.weight", norms, head),
        )
        counts = self.num_doubles, self.num_singles
        return Table(outside, double_and_single_stacks(heads, counts, double, single))


FAMILY = Family(
    name="flux",
    label="FLUX.1",
    models=("dev", "schnell", "Krea", "Kontext", "Fill", "Canny", "Depth"),
    sizes=FluxSizes,
    # FLUX.2 has no vector_in, Chroma no img_mod, HunyuanVideo no linear txt_in.
    signature=("double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight", "txt_in.weight"),
    diffusers_class="FluxTransformer2DModel",
    published=FluxSizes(24, 128, 19, 38, 16, 16, 4096, 768, True, "scale"),
    small=FluxSizes(24, 16, 2, 2, 16, 16, 64, 48, True, "scale"),
    text_tokens=512,
    numbers={of.REFERENCES_MOVE: of.REFERENCES_MOVE},
    shares_tokens=True,
    widens="img_in.weight",
    style_patches={"UsoStyleProjectorPatch": "SigLIPMultiFeatProjModel"},
)
