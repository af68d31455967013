"""The family's files, sizes and split. Its file has names of its own for some tensors."""

from dataclasses import dataclass
from functools import cached_property

from tp_runtime.models import family as of
from tp_runtime.models import rows
from tp_runtime.models.family import Family, Geometry, Input, Sizes, size
from tp_runtime.sharding.plan import Column, MergedColumn, Replicated, Row, Split
from tp_runtime.sharding.table import IMAGE, ITEM, PROMPT, TEXT, Attention, Linear, Stack, Table
from tp_runtime.sharding.table import Tensor as Weights


@dataclass(frozen=True)
class ExampleSizes(Sizes):
    """A video model; heads of 16 features, and of 24 in the cross-attention."""

    num_heads: int = size(lambda s: s["img_in.weight"][0] // 16, "num_attention_heads")
    head_dim: int = size(lambda _: 16, "attention_head_dim")
    num_kv_heads: int = size(of.length("blocks.0.k_norm.weight", per=16), "num_kv_heads")
    cross_heads: int = size(of.length("blocks.0.cross.q.weight", per=24), "num_cross_heads")
    mlp_dim: int = size(lambda s: s["blocks.0.out.weight"][1] - s["img_in.weight"][0], "mlp_dim")
    num_blocks: int = size(of.blocks("blocks"), "num_layers")
    channels: int = size(of.length("img_in.weight", 1, per=4), "in_channels")
    context_dim: int = size(of.length("txt_in.weight", 1), "text_dim")

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.channels, video=True)

    @property
    def inputs(self) -> dict[str, Input]:
        times = Input("Timesteps", ("batch", "positions"), kind="number")
        return {"timesteps": times, "context": of.captions(self.context_dim)}

    @cached_property
    def table(self) -> Table:
        dim, mlp, patch, cross = (
            self.dim,
            self.mlp_dim,
            4 * self.channels,
            self.cross_heads * 24,
        )
        q = Split(self.num_heads, self.head_dim, groups=self.num_kv_heads)
        kv, of_mlp = Split(self.num_kv_heads, self.head_dim, shared=True), Split(mlp)
        packed, heads = Column((q, kv, kv, of_mlp, of_mlp)), Split(self.cross_heads, 24)
        of_text, gathered = MergedColumn("to_kv", (24, 24)), Column(gather=True)
        block = (
            Linear("modulation", "mod", gathered, dim, 3 * dim, ITEM),
            Linear("qkv_mlp", "in", packed, dim, dim + 2 * kv.full + 2 * mlp, IMAGE, bias=False),
            Linear("out", "out", Row((q, of_mlp)), dim + mlp, dim, IMAGE),
            Linear("to_q", "cross.q", Column((heads,)), dim, cross, IMAGE),
            Linear("{to_k,to_v}", "cross.{k,v}", of_text, dim, (cross, cross), PROMPT),
            Linear("to_out", "cross.out", Row((heads,)), cross, dim, IMAGE),
            Weights("norm_q.weight", "q_norm.weight", (dim,), q),
            Weights("norm_k.weight", "k_norm.weight", (kv.full,), kv),
            Weights("norm_cross_q.weight", "cross.q_norm.weight", (cross,), heads),
            Weights("norm_cross.{weight,bias}", "cross.norm.{weight,bias}", (dim,)),
        )
        attentions = Attention(q, IMAGE, IMAGE), Attention(heads, IMAGE, TEXT)
        outside = (
            Linear("patch_in", "img_in", Replicated(), patch, dim),
            Linear("text_in", "txt_in", gathered, self.context_dim, dim),
            *rows.mlp("time_in.{0,2}", "time.{in,out}", (32, dim, dim)),
            Linear("last", "img_out", Replicated(), dim, patch),
        )
        return Table(outside, (Stack("blocks", "blocks", self.num_blocks, block, attentions),))


SMALL = ExampleSizes(12, 16, 6, 8, 320, 3, 4, 40)
FAMILY = Family(
    name="example",
    label="Example",
    models=("small",),
    sizes=ExampleSizes,
    signature=("blocks.0.cross.q_norm.weight", "time.in.weight"),
    diffusers_class="ExampleTransformer3DModel",
    published=SMALL,
    small=SMALL,
    text_tokens=32,
    extents=((128, 128, 17),),
)
