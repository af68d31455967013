"""Rows that the tables of several families have: an MLP, attention by diffusers' names, stacks."""

from ..sharding.plan import QKV, Column, Row, Split
from ..sharding.table import ALL, IMAGE, TEXT, Attention, Linear, Stack, TableRow, expanded

TIME_CHANNELS = 256  # sinusoids of a timestep, which it is embedded from

# Paths in the file: of q, k and v, and of the linear after attention; empty: diffusers'.
Files = tuple[str, str]
_AS_OURS: Files = ("", "")


def mlp(
    ours: str, file: str, widths: tuple[int, int, int], over: str = ALL, bias: bool = True
) -> tuple[Linear, Linear]:
    """Two linears with an activation between them, in a block or for a timestep or a caption.

    ``ours``, ``file``: paths of both, as ``linear_{1,2}``; ``file`` empty: the same as ``ours``.
    ``widths``: of the input, of what is between the linears, and of the output.
    """
    inputs, hidden, outputs = widths
    first, second = expanded(ours)
    first_file, second_file = expanded(file) if file else _AS_OURS
    return (
        Linear(first, first_file, Column(), inputs, hidden, over, bias),
        Linear(second, second_file, Row(), hidden, outputs, over, bias),
    )


def attention(
    ours: str,
    heads: Split,
    dim: int,
    files: Files = _AS_OURS,
    over: str = ALL,
    bias: bool = True,
) -> tuple[Linear, Linear]:
    """Of tokens ``dim`` wide to themselves. ``ours``: the path of diffusers' module for it."""
    to_out = Linear(f"{ours}.to_out.0", files[1], Row((heads,)), heads.full, dim, over, bias)
    return _qkv(f"{ours}.{{to_q,to_k,to_v}}", files[0], "to_qkv", heads, dim, over, bias), to_out


def joint_attention(
    heads: Split, dim: int, image: Files = _AS_OURS, text: Files = _AS_OURS, bias: bool = True
) -> tuple[Linear, ...]:
    """``attn``: of an image's and a text's tokens to both, with linears of their own for each."""
    added, add_out = "attn.{add_q_proj,add_k_proj,add_v_proj}", "attn.to_add_out"
    of_image, to_out = attention("attn", heads, dim, image, IMAGE, bias)
    of_text = _qkv(added, text[0], "to_added_qkv", heads, dim, TEXT, bias)
    return of_image, of_text, to_out, Linear(add_out, text[1], Row((heads,)), dim, dim, TEXT, bias)


def double_and_single_stacks(
    heads: Split,
    counts: tuple[int, int],
    double: tuple[TableRow, ...],
    single: tuple[TableRow, ...],
) -> tuple[Stack, Stack]:
    """Blocks with two streams, and then those with one, by diffusers' and ComfyUI's names."""
    ours, attentions = "transformer_blocks", (Attention(heads),)
    doubles = Stack(ours, "double_blocks", counts[0], double, attentions)
    return doubles, Stack(f"single_{ours}", "single_blocks", counts[1], single, attentions)


def _qkv(ours: str, file: str, into: str, heads: Split, dim: int, over: str, bias: bool) -> Linear:
    style = QKV(into, heads.unit, heads.count, heads.count)
    return Linear(ours, file, style, dim, 3 * (heads.full,), over, bias)
