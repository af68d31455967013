"""FLUX.2 (dev, klein 4B and 9B): its files, sizes and split.

Module: diffusers' ``Flux2Transformer2DModel`` (0.42, models/transformers/transformer_flux2.py).
File: ComfyUI's ``Flux`` with ``global_modulation`` (0.3.75, comfy/ldm/flux/model.py).
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

from ...sharding.plan import Column, Replicated, Row, Split
from ...sharding.table import IMAGE, TEXT, Linear, Table, TableRow, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..rows import TIME_CHANNELS, double_and_single_stacks, joint_attention, mlp

MLP_RATIO = 3  # fixed in ComfyUI's model detection
MAX_REFERENCES = 10  # which the models were published for
_NORM = "double_blocks.0.img_attn.norm.query_norm"
_EITHER = f"{_NORM}.{{scale,weight}}"
_IMAGE_ATTENTION = "img_attn.qkv", "img_attn.proj"
_TEXT_ATTENTION = "txt_attn.qkv", "txt_attn.proj"


@dataclass(frozen=True)
class Flux2Sizes(Sizes):
    """The text encoder's hidden layers lie side by side in ``context_dim``."""

    patch_size: ClassVar = 1
    to_diffusers: ClassVar = "patch_size axes_dims_rope=axes_dims"
    to_comfyui: ClassVar = "num_heads out_channels axes_dim=axes_dims"
    plain_inputs, unused_inputs = ("control", "ref_latents_method"), ("y",)
    options: ClassVar = ("rope_options",)
    num_heads: int = size(of.heads("img_in.weight", _EITHER), "num_attention_heads")
    head_dim: int = size(of.length(_EITHER), "attention_head_dim")
    num_doubles: int = size(of.blocks("double_blocks"), "num_layers")
    num_singles: int = size(of.blocks("single_blocks"), "num_single_layers")
    in_channels: int = size(of.length("img_in.weight", 1), "in_channels")
    out_channels: int = size(
        of.length("final_layer.linear.weight"), "out_channels", absent="in_channels"
    )
    context_dim: int = size(of.length("txt_in.weight", 1), "joint_attention_dim")
    guidance: bool = size(of.has("guidance_in.in_layer.weight"), "guidance_embeds", absent=True)
    norm_name: str = size(of.has(f"{_NORM}.weight", "weight", "scale"), lambda _: "scale")

    @property
    def axes_dims(self) -> tuple[int, ...]:
        """Features of a head that turn with picture, row, column and place in the text."""
        return (self.head_dim // 4,) * 4

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.in_channels, self.out_channels, downscale=16, patch=(1, 1, 1))

    @property
    def inputs(self) -> dict[str, Input]:
        captions = of.captions(self.context_dim)
        references = self.geometry.references(at_most=MAX_REFERENCES)
        others = {"ref_latents": references, "attention_mask": of.MASKS}
        return {"context": captions, "guidance": of.GUIDANCES, **others}

    @cached_property
    def table(self) -> Table:
        dim, width = self.dim, MLP_RATIO * self.dim
        heads, hidden = Split(self.num_heads, self.head_dim), Split(width)
        gathered, gate_and_up = Column(gather=True), Column((hidden, hidden))
        norms, head = f"norm.{{query,key}}_norm.{self.norm_name}", (self.head_dim,)
        linear = partial(Linear, bias=False)

        def embedder(ours: str, file: str) -> tuple[Linear, ...]:
            path = f"time_guidance_embed.{ours}_embedder.linear_{{1,2}}"
            return mlp(path, f"{file}.{{in,out}}_layer", (TIME_CHANNELS, dim, dim), bias=False)

        def modulation(name: str, count: int) -> Linear:
            return linear(f"{name}.linear", f"{name}.lin", gathered, dim, count * dim)

        scale_and_shift = "final_layer.adaLN_modulation.1"
        outside = (
            linear("x_embedder", "img_in", Replicated(), self.in_channels, dim),
            linear("context_embedder", "txt_in", gathered, self.context_dim, dim),
            *embedder("timestep", "time_in"),
            *(embedder("guidance", "guidance_in") if self.guidance else ()),
            modulation("double_stream_modulation_img", 6),
            modulation("double_stream_modulation_txt", 6),
            modulation("single_stream_modulation", 3),
            linear("norm_out.linear", scale_and_shift, gathered, dim, 2 * dim, swapped=True),
            linear("proj_out", "final_layer.linear", Replicated(), dim, self.out_channels),
        )
        double: tuple[TableRow, ...] = (
            *joint_attention(heads, dim, _IMAGE_ATTENTION, _TEXT_ATTENTION, bias=False),
            linear("ff.linear_in", "img_mlp.0", gate_and_up, dim, 2 * width, IMAGE),
            linear("ff.linear_out", "img_mlp.2", Row(), width, dim, IMAGE),
            linear("ff_context.linear_in", "txt_mlp.0", gate_and_up, dim, 2 * width, TEXT),
            linear("ff_context.linear_out", "txt_mlp.2", Row(), width, dim, TEXT),
            Tensor("attn.norm_{q,k}.weight", f"img_attn.{norms}", head),
            Tensor("attn.norm_added_{q,k}.weight", f"txt_attn.{norms}", head),
        )
        packed, features = Column((*3 * (heads,), *2 * (hidden,))), 3 * dim + 2 * width
        single = (
            linear("attn.to_qkv_mlp_proj", "linear1", packed, dim, features),
            linear("attn.to_out", "linear2", Row((heads, hidden)), dim + width, dim),
            Tensor("attn.norm_{q,k}.weight", norms, head),
        )
        counts = self.num_doubles, self.num_singles
        return Table(outside, double_and_single_stacks(heads, counts, double, single))


FAMILY = Family(
    name="flux2",
    label="FLUX.2",
    models=("dev", "klein 4B", "klein 9B"),
    sizes=Flux2Sizes,
    signature=("double_stream_modulation_img.lin.weight", "single_stream_modulation.lin.weight"),
    diffusers_class="Flux2Transformer2DModel",
    published=Flux2Sizes(48, 128, 8, 48, 128, 128, 15360, True, "scale"),
    small=Flux2Sizes(24, 16, 2, 2, 128, 128, 64, True, "scale"),
    text_tokens=512,
    numbers={of.REFERENCES_MOVE: of.REFERENCES_MOVE},
    shares_tokens=True,
    widens="img_in.weight",
)
