"""Qwen-Image, Qwen-Image-Edit and Qwen-Image-Layered: their files, sizes and split.

Module: diffusers' ``QwenImageTransformer2DModel`` (0.42, models/transformers/
transformer_qwenimage.py). The file of ComfyUI's class of that name (0.3.75, and 0.33 for Edit-2511
and Layered; comfy/ldm/qwen_image/model.py) has its names.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ...config import MODEL_PATCHES
from ...sharding.plan import Column, Replicated, Split
from ...sharding.table import IMAGE, ITEM, TEXT, Attention, Linear, Stack, Table, TableRow, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..rows import TIME_CHANNELS, joint_attention, mlp
from .model_patch import BlockWiseControl

ZERO_TIME = "__index_timestep_zero__"
ADDED_TIME = "time_text_embed.addition_t_embedding.weight"
_NORM = "transformer_blocks.0.attn.norm_q.weight"


@dataclass(frozen=True)
class QwenImageSizes(Sizes):
    """``in_channels``, ``out_channels``: of a latent, before it is packed into patches.

    ``zero_time``: references are at time 0 (Edit-2511); a folder does not say it to ComfyUI.
    ``added_time``: pictures of several layers, with an embedding that is added to the time's.
    """

    patch_size: ClassVar = 2
    to_diffusers: ClassVar = "patch_size axes_dims_rope=axes_dims"
    to_comfyui: ClassVar = (
        "num_attention_heads=num_heads attention_head_dim=head_dim joint_attention_dim=context_dim "
        "out_channels axes_dims_rope=axes_dims"
    )
    plain_inputs: ClassVar = ("control", "ref_latents_method", MODEL_PATCHES)
    num_heads: int = size(of.heads("img_in.weight", _NORM), "num_attention_heads")
    head_dim: int = size(of.length(_NORM), "attention_head_dim")
    num_blocks: int = size(of.blocks("transformer_blocks"), "num_layers")
    in_channels: int = size(of.length("img_in.weight", 1, 4), "in_channels", times=4)
    out_channels: int = size(of.length("proj_out.weight", 0, 4), "out_channels")
    context_dim: int = size(of.length("txt_norm.weight"), "joint_attention_dim")
    zero_time: bool = size(of.has(ZERO_TIME), lambda _: False)
    added_time: bool = size(of.has(ADDED_TIME), "use_additional_t_cond", absent=False)

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.in_channels, self.out_channels, video=True)

    @property
    def inputs(self) -> dict[str, Input]:
        mask = Input("Masks of captions", ("batch", "tokens"), optional=True, kind="any")
        others = {"ref_latents": self.geometry.references(), "attention_mask": mask}
        return {"context": of.captions(self.context_dim), **others}

    @cached_property
    def table(self) -> Table:
        dim, heads, gathered = self.dim, Split(self.num_heads, self.head_dim), Column(gather=True)
        widths, time = (dim, 4 * dim, dim), "time_text_embed.timestep_embedder"
        outside = (
            Linear("img_in", "", Replicated(), 4 * self.in_channels, dim),
            Linear("txt_in", "", gathered, self.context_dim, dim),
            *mlp(f"{time}.linear_{{1,2}}", "", (TIME_CHANNELS, dim, dim)),
            Linear("norm_out.linear", "", gathered, dim, 2 * dim),
            Linear("proj_out", "", Replicated(), dim, 4 * self.out_channels),
            Tensor("txt_norm.weight", "", (self.context_dim,)),
            *((Tensor(ADDED_TIME, "", (2, dim)),) if self.added_time else ()),
        )
        block: tuple[TableRow, ...] = (
            Linear("img_mod.1", "", Column(), dim, 6 * dim, ITEM),
            Linear("txt_mod.1", "", Column(), dim, 6 * dim, ITEM),
            *joint_attention(heads, dim),
            *mlp("img_mlp.net.{0.proj,2}", "", widths, IMAGE),
            *mlp("txt_mlp.net.{0.proj,2}", "", widths, TEXT),
            Tensor("attn.norm_{q,k,added_q,added_k}.weight", "", (self.head_dim,)),
        )
        stack = "transformer_blocks"
        blocks = Stack(stack, stack, self.num_blocks, block, (Attention(heads),))
        return Table(outside, (blocks,), markers={ZERO_TIME: (0,)} if self.zero_time else {})


FAMILY = Family(
    name="qwen_image",
    label="Qwen-Image",
    models=("Qwen-Image", "2512", "Edit", "Edit-2509", "Edit-2511", "Layered"),
    sizes=QwenImageSizes,
    signature=("txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    diffusers_class="QwenImageTransformer2DModel",
    published=QwenImageSizes(24, 128, 60, 16, 16, 3584, False, False),
    small=QwenImageSizes(24, 16, 3, 16, 16, 64, False, False),
    variants={"zero_cond_t": "Qwen-Image-Edit-2511 as a diffusers folder"},
    newer={
        ZERO_TIME: ("Qwen-Image-Edit-2511", "0.33"),
        ADDED_TIME: ("Qwen-Image-Layered", "0.33"),
    },
    # Where ComfyUI's class is older, it takes the mask and does not look at it.
    used_with={"attention_mask": "default_ref_method"},
    refused_inputs={
        "guidance": "a guidance that the model was trained with, which no published one was",
        "additional_t_cond": "which picture of several layers is the first, which no node says",
    },
    shares_tokens=True,
    model_patches=(BlockWiseControl,),
)
