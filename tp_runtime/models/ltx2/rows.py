"""LTX-2's table: the rows of its streams and of its connectors."""

from collections.abc import Iterator
from typing import Any

from ...sharding.plan import Column, MergedColumn, Replicated, Row, Split
from ...sharding.table import (
    IMAGE,
    ITEM,
    PROMPT,
    TEXT,
    Attention,
    Linear,
    Stack,
    Table,
    TableRow,
    Tensor,
)
from ..rows import TIME_CHANNELS, attention, mlp

MLP_RATIO = 4  # of ComfyUI's class, and of its connectors
REGISTERS = 128  # learned tokens, which fill up a caption
LAYERS = "transformer_1d_blocks"


def table_of(sizes: Any) -> Table:
    """Of ``LTX2Sizes``."""
    dim, audio = sizes.dim, sizes.audio_dim
    rows = 9 if sizes.text_modulation else 6
    outside: tuple[TableRow, ...] = (
        Linear("proj_in", "patchify_proj", Replicated(), sizes.in_channels, dim),
        Linear("audio_proj_in", "audio_patchify_proj", Replicated(), sizes.audio_channels, audio),
        *_modulation("time_embed", "adaln_single", dim, rows),
        *_modulation("audio_time_embed", "audio_adaln_single", audio, rows),
        *_cross_modulation("video", "scale_shift", "video_scale_shift", dim, 4),
        *_cross_modulation("audio", "scale_shift", "audio_scale_shift", audio, 4),
        *_cross_modulation("video", "a2v_gate", "a2v_gate", dim, 1),
        *_cross_modulation("audio", "v2a_gate", "v2a_gate", audio, 1),
        Tensor("scale_shift_table", "", (2, dim)),
        Tensor("audio_scale_shift_table", "", (2, audio)),
        Linear("proj_out", "", Replicated(), dim, sizes.in_channels),
        Linear("audio_proj_out", "", Replicated(), audio, sizes.audio_channels),
    )
    if sizes.text_modulation:
        outside += (
            *_modulation("prompt_adaln", "prompt_adaln_single", dim, 2),
            *_modulation("audio_prompt_adaln", "audio_prompt_adaln_single", audio, 2),
        )
    if sizes.projects:
        for name, width in (("caption_projection", dim), ("audio_caption_projection", audio)):
            outside += mlp(f"{name}.linear_{{1,2}}", "", (sizes.caption_channels, width, width))
    if sizes.keyframe_mark:
        outside += (Tensor("keyframes_abs_pos_embedding", "", (1, dim)),)
    attentions = (
        Attention(Split(sizes.num_heads, sizes.head_dim), IMAGE, IMAGE),
        Attention(Split(sizes.num_heads, sizes.head_dim), IMAGE, TEXT),
    )
    name = "transformer_blocks"
    blocks = Stack(name, name, sizes.num_blocks, tuple(_block(sizes)), attentions)
    stacks = [blocks]
    for which, heads, head_dim in sizes.connectors:
        path, width = f"{which}_embeddings_connector", heads * head_dim
        outside += (Tensor(f"{path}.learnable_registers", "", (REGISTERS, width)),)
        layer = (
            *_attention("attn1", heads, head_dim, width, sizes.connector_gated, PROMPT),
            *_feed_forward("ff", width, True, PROMPT),
        )
        ours, file = f"{path}.transformer_blocks", f"{path}.{LAYERS}"
        stacks.append(Stack(ours, file, sizes.connector_blocks, layer))
    return Table(outside, tuple(stacks))


def _block(sizes: Any) -> Iterator[TableRow]:
    """Few tokens are sound: in costs, its linears count as those of one row."""
    dim, audio, gated = sizes.dim, sizes.audio_dim, sizes.gated
    heads = sizes.num_heads, sizes.head_dim
    audio_heads = sizes.audio_heads, sizes.audio_head_dim
    yield from _attention("attn1", *heads, dim, gated, IMAGE)
    yield from _attention("attn2", *heads, dim, gated, IMAGE, dim, TEXT)
    yield from _attention("audio_attn1", *audio_heads, audio, gated, ITEM)
    yield from _attention("audio_attn2", *audio_heads, audio, gated, ITEM, audio, TEXT)
    # Named by what is given: sound to the video, whose queries these are.
    yield from _attention("audio_to_video_attn", *audio_heads, dim, gated, IMAGE, audio, ITEM)
    yield from _attention("video_to_audio_attn", *audio_heads, audio, gated, ITEM, dim, IMAGE)
    yield from _feed_forward("ff", dim, sizes.ff_bias, IMAGE)
    yield from _feed_forward("audio_ff", audio, sizes.audio_ff_bias, ITEM)
    rows = 9 if sizes.text_modulation else 6
    cross = "a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca"
    for prefix, width, which in (("", dim, "video"), ("audio_", audio, "audio")):
        yield Tensor(f"{prefix}scale_shift_table", "", (rows, width))
        yield Tensor(f"{which}_{cross[0]}", f"{cross[1]}_{which}", (5, width))
        if sizes.text_modulation:
            yield Tensor(f"{prefix}prompt_scale_shift_table", "", (2, width))


def _modulation(ours: str, file: str, dim: int, rows: int) -> Iterator[Linear]:
    """What makes ``rows`` rows of a timestep."""
    path = "emb.timestep_embedder.linear_{1,2}"
    yield from mlp(f"{ours}.{path}", f"{file}.{path}", (TIME_CHANNELS, dim, dim))
    yield Linear(f"{ours}.linear", f"{file}.linear", Column(gather=True), dim, rows * dim)


def _cross_modulation(which: str, kind: str, file: str, dim: int, rows: int) -> Iterator[Linear]:
    ours = f"av_cross_attn_{which}_{kind}"
    return _modulation(ours, f"av_ca_{file}_adaln_single", dim, rows)


def _attention(
    path: str,
    num_heads: int,
    head_dim: int,
    width: int,
    gated: bool,
    over: str,
    of_keys: int = 0,
    over_keys: str = "",
) -> Iterator[TableRow]:
    """Of tokens ``width`` wide to themselves, or to others ``of_keys`` wide."""
    heads, inner = Split(num_heads, head_dim), num_heads * head_dim
    if of_keys:
        both = MergedColumn("to_kv", (head_dim, head_dim))
        yield Linear(f"{path}.to_q", "", Column((heads,)), width, inner, over)
        yield Linear(f"{path}.{{to_k,to_v}}", "", both, of_keys, 2 * (inner,), over_keys)
        yield Linear(f"{path}.to_out.0", "", Row((heads,)), inner, width, over)
    else:
        yield from attention(path, heads, width, over=over)
    yield Tensor(f"{path}.norm_{{q,k}}.weight", f"{path}.{{q,k}}_norm.weight", (inner,), heads)
    if gated:
        split = Column((Split(num_heads, per_head=True),))
        yield Linear(f"{path}.to_gate_logits", "", split, width, num_heads, over)


def _feed_forward(path: str, width: int, bias: bool, over: str) -> tuple[Linear, Linear]:
    return mlp(f"{path}.net.{{0.proj,2}}", "", (width, MLP_RATIO * width, width), over, bias)
