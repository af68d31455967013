"""Krea 2 (Raw, Turbo): its files, sizes and split.

Module: diffusers' ``Krea2Transformer2DModel`` (0.42, models/transformers/transformer_krea2.py).
File: ComfyUI's ``SingleStreamDiT`` (0.33, comfy/ldm/krea2/model.py).
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

from ...sharding.plan import Column, MergedColumn, Replicated, Row, Split, grouped_heads
from ...sharding.table import ALL, PROMPT, Attention, Linear, Stack, Table, TableRow, Tensor
from .. import family as of
from ..family import Family, Geometry, Input, Sizes, size
from ..rows import TIME_CHANNELS, mlp

PATCH = 2
FUSION_BLOCKS = 2  # of each kind; fixed in ComfyUI's class
_MARK = "txtfusion.projector.weight"
_BLOCK, _FUSION = "blocks.0", "txtfusion.layerwise_blocks.0"
_NORM, _TEXT_NORM = (f"{block}.attn.qknorm.qnorm.scale" for block in (_BLOCK, _FUSION))


@dataclass(frozen=True)
class Krea2Sizes(Sizes):
    """``num_text_layers`` of the text encoder's layers lie side by side in a caption's features."""

    to_diffusers: ClassVar = "axes_dims_rope=axes_dims"
    to_comfyui: ClassVar = (
        "heads=num_heads kvheads=num_kv_heads txtheads=num_text_heads txtkvheads=num_text_kv_heads"
    )
    plain_inputs, unused_inputs = ("ref_latents_method",), ("attention_mask",)
    num_heads: int = size(of.heads("first.weight", _NORM), "num_attention_heads")
    head_dim: int = size(of.length(_NORM), "attention_head_dim")
    num_kv_heads: int = size(of.heads(f"{_BLOCK}.attn.wk.weight", _NORM), "num_key_value_heads")
    num_blocks: int = size(of.blocks("blocks"), "num_layers")
    ffn_dim: int = size(of.length(f"{_BLOCK}.mlp.up.weight"), "intermediate_size")
    channels: int = size(of.length("first.weight", 1, PATCH**2), "in_channels", times=PATCH**2)
    text_dim: int = size(of.length("txtmlp.0.scale"), "text_hidden_dim")
    num_text_layers: int = size(of.length(_MARK, 1), "num_text_layers")
    num_text_heads: int = size(of.heads("txtmlp.0.scale", _TEXT_NORM), "text_num_attention_heads")
    num_text_kv_heads: int = size(
        of.heads(f"{_FUSION}.attn.wk.weight", _TEXT_NORM), "text_num_key_value_heads"
    )
    text_ffn_dim: int = size(of.length(f"{_FUSION}.mlp.up.weight"), "text_intermediate_size")

    @property
    def axes_dims(self) -> tuple[int, ...]:
        """Features of a head that turn with picture, row and column: 32, 48, 48 of 128."""
        along = self.head_dim // 16 * 6
        return self.head_dim - 2 * along, along, along

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.channels, video=True, num_frames=1)

    @property
    def inputs(self) -> dict[str, Input]:
        captions = of.captions(self.num_text_layers * self.text_dim)
        return {"context": captions, "ref_latents": self.geometry.references()}

    @property
    def heads(self) -> tuple[Split, Split]:
        """Of queries, and of keys and values."""
        return grouped_heads(self.num_heads, self.num_kv_heads, self.head_dim)

    @property
    def text_heads(self) -> tuple[Split, Split]:
        """The same of the blocks that fuse the text."""
        head_dim = self.text_dim // self.num_text_heads
        return grouped_heads(self.num_text_heads, self.num_text_kv_heads, head_dim)

    @cached_property
    def table(self) -> Table:
        dim, text, patch = self.dim, self.text_dim, PATCH**2 * self.channels
        heads, text_heads = self.heads, self.text_heads
        projector = "text_fusion.projector", "txtfusion.projector"
        outside = (
            Linear("img_in", "first", Replicated(), patch, dim),
            *mlp("time_embed.linear_{1,2}", "tmlp.{0,2}", (TIME_CHANNELS, dim, dim)),
            Linear("time_mod_proj", "tproj.1", Column(gather=True), dim, 6 * dim),
            Linear(*projector, Replicated(), self.num_text_layers, 1, PROMPT, False),
            Tensor("txt_in.norm.weight", "txtmlp.0.scale", (text,)),
            *mlp("txt_in.linear_{1,2}", "txtmlp.{1,3}", (text, dim, dim), PROMPT),
            Linear("final_layer.linear", "last.linear", Replicated(), dim, patch),
            Tensor("final_layer.norm.weight", "last.norm.scale", (dim,)),
            Tensor("final_layer.scale_shift_table", "last.modulation.lin", (2, dim)),
        )
        block = *_block(heads, self.ffn_dim), Tensor("scale_shift_table", "mod.lin", (6 * dim,))
        fused = _block(text_heads, self.text_ffn_dim, over=PROMPT)
        fusion = (
            Stack(f"text_fusion.{kind}", f"txtfusion.{kind}", FUSION_BLOCKS, fused)
            for kind in ("layerwise_blocks", "refiner_blocks")
        )
        attention = (Attention(heads[0], kv_heads=heads[1]),)
        blocks = Stack("transformer_blocks", "blocks", self.num_blocks, block, attention)
        return Table(outside, (*fusion, blocks))


def _block(heads: tuple[Split, Split], ffn: int, over: str = ALL) -> tuple[TableRow, ...]:
    """Attention, with a gate for each of its outputs, and an MLP."""
    q, kv = heads
    dim, qkv_gate = q.full, MergedColumn("to_qkv_gate", (q, kv, kv, q))
    linear = partial(Linear, over=over, bias=False)
    return (
        linear(
            "attn.{to_q,to_k,to_v,to_gate}",
            "attn.{wq,wk,wv,gate}",
            qkv_gate,
            dim,
            (dim, kv.full, kv.full, dim),
        ),
        linear("attn.to_out.0", "attn.wo", Row((q,)), dim, dim),
        linear("ff.{gate,up}", "mlp.{gate,up}", MergedColumn("gate_up"), dim, (ffn, ffn)),
        linear("ff.down", "mlp.down", Row(), ffn, dim),
        Tensor("attn.norm_{q,k}.weight", "attn.qknorm.{qnorm,knorm}.scale", (q.unit,)),
        Tensor("norm{1,2}.weight", "{prenorm,postnorm}.scale", (dim,)),
    )


FAMILY = Family(
    name="krea2",
    label="Krea 2",
    models=("Raw", "Turbo"),
    sizes=Krea2Sizes,
    signature=(_MARK, "tproj.1.weight"),
    diffusers_class="Krea2Transformer2DModel",
    published=Krea2Sizes(48, 128, 12, 28, 16384, 16, 2560, 12, 20, 20, 6912),
    small=Krea2Sizes(24, 16, 12, 2, 1024, 16, 80, 12, 5, 5, 256),
    newer={_MARK: ("Krea 2", "0.33")},
    text_tokens=512,
    shares_tokens=True,
)
