"""The rows of a block, of which the model and its ControlNets are built."""

from typing import Any

from ...sharding.plan import Column, MergedColumn, Row, Split
from ...sharding.table import ITEM, Linear, TableRow, Tensor
from ..rows import attention

EMBEDDER = "2-1"  # diffusers' name of patches of 2 x 2, in one picture


def block(sizes: Any, over: str) -> tuple[TableRow, ...]:
    """Without a modulation; ``sizes``: of the model, or of a ControlNet."""
    dim, ffn, heads = sizes.dim, sizes.ffn_dim, Split(sizes.num_heads, sizes.head_dim)
    files, up = ("attention.qkv", "attention.out"), MergedColumn("w13")
    norms = "{attention_norm1,attention_norm2,ffn_norm1,ffn_norm2}.weight"
    return (
        *attention("attention", heads, dim, files, over, bias=False),
        Linear("feed_forward.{w1,w3}", "", up, dim, (ffn, ffn), over, False),
        Linear("feed_forward.w2", "", Row(), ffn, dim, over, False),
        Tensor("attention.norm_{q,k}.weight", "attention.{q,k}_norm.weight", (sizes.head_dim,)),
        Tensor(norms, "", (dim,)),
    )


def modulated_block(sizes: Any, over: str) -> tuple[TableRow, ...]:
    """The same with its modulation."""
    modulation = Column(), adaln_dim(sizes.dim), 4 * sizes.dim
    return (*block(sizes, over), Linear("adaLN_modulation.0", "", *modulation, ITEM))


def adaln_dim(dim: int) -> int:
    """Width of what modulation is computed from."""
    return min(dim, 256)
