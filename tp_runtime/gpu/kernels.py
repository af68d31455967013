"""The GPU kernels of our own.

``rotated_heads``: norm and rotary embedding of query and key heads. Of this the compiler makes a
reduction that reads at a quarter of the memory's speed.

``normed_heads``: the same where the norm is over the heads of all ranks, with ``sum_of_squares``.

``attended_and_gelu``: what the last linear of FLUX.1's single block takes. The compiler's kernel is
bound by its tanh, not by memory.

``residual_norm``: the sum of the ranks' parts of a row-parallel linear, read from each other's
memory, with the residual and the norm that follow it. It takes as long as the sum alone.

Both measured on H200s, see ``bench/RESULTS.md``. ``models/layers.py`` has the same in plain torch,
which is what these must equal.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .epilogue import Epilogue, strides

_HEADS_PER_PROGRAM = 8


@triton.jit
def _norm_rotate(
    qkv,
    norm_q,
    norm_k,
    rotation,
    out,
    num_tokens,
    num_heads,
    num_kv_heads,
    first_token,
    total_tokens,
    num_rows,
    qkv_batch_stride,
    qkv_token_stride,
    eps,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: ``HEADS`` heads of one token of q (axis 2: 0), k (1) or v (2, copied)."""
    token = tl.program_id(0) % num_tokens
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    which = tl.program_id(2)
    features = tl.arange(0, HEAD_DIM)
    places = heads[:, None] * HEAD_DIM + features[None, :]
    count = tl.where(which == 0, num_heads, num_kv_heads)
    exists = (heads < count)[:, None]
    # Where they begin among the heads of a token; ``out`` has all q, then all k, then all v.
    before = tl.where(which == 0, 0, num_heads + (which - 1) * num_kv_heads).to(tl.int64) * HEAD_DIM

    source = qkv + batch * qkv_batch_stride + token.to(tl.int64) * qkv_token_stride
    loaded = tl.load(source + before + places, mask=exists, other=0.0)
    position = (first_token + token).to(tl.int64)
    target = out + before * num_rows + (batch * total_tokens + position) * count * HEAD_DIM
    if which == 2:
        tl.store(target + places, loaded, mask=exists)
        return
    x = loaded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
    weight = tl.load((norm_q if which == 0 else norm_k) + features).to(tl.float32)
    normed = (x * scale[:, None] * weight[None, :]).to(loaded.dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, (HEADS, HEAD_DIM // 2, 2)))
    angles = tl.load(rotation + position * HEAD_DIM + features)
    cos, sin = tl.split(tl.reshape(angles, (HEAD_DIM // 2, 2)))
    rotated = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    rotated = tl.reshape(rotated, (HEADS, HEAD_DIM))
    tl.store(target + places, rotated.to(loaded.dtype), mask=exists)


def rotated_heads(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    rotation: torch.Tensor,
    eps: float,
    num_kv: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``models.layers.rotated_heads``. CUDA tensors; head widths that are powers of two."""
    first = parts[0][0]
    batch, _, all_heads, head_dim = first.shape
    num_heads = all_heads - 2 * num_kv
    total = sum(part[0].shape[1] for part in parts)
    # A single part's v needs no copy: attention reads it where it is.
    counts = [num_heads, num_kv] if len(parts) == 1 else [num_heads, num_kv, num_kv]
    out = first.new_empty(batch * total * sum(counts) * head_dim)
    start = 0
    for qkv, norm_q, norm_k in parts:
        length = qkv.shape[1]
        grid: Any = (batch * length, triton.cdiv(num_heads, _HEADS_PER_PROGRAM), len(counts))
        _norm_rotate[grid](
            qkv,
            norm_q,
            norm_k,
            rotation,
            out,
            length,
            num_heads,
            num_kv,
            start,
            total,
            batch * total,
            qkv.stride(0),
            qkv.stride(1),
            eps,
            HEAD_DIM=head_dim,
            HEADS=_HEADS_PER_PROGRAM,
            num_warps=2,
        )
        start += length
    found = out.split([batch * total * count * head_dim for count in counts])
    q, k, *copied = (
        one.view(batch, total, count, head_dim) for one, count in zip(found, counts, strict=True)
    )
    return q, k, copied[0] if copied else first[:, :, -num_kv:]


_FEATURES_AT_A_TIME = 2048


@triton.jit
def _square(source, width, WIDTH: tl.constexpr):
    """The sum of the squares of a row's ``width`` features, ``WIDTH`` at a time."""
    sums = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, width, WIDTH):
        features = start + tl.arange(0, WIDTH)
        loaded = tl.load(source + features, mask=features < width, other=0.0).to(tl.float32)
        sums += loaded * loaded
    return tl.sum(sums, axis=0)


@triton.jit
def _sum_of_squares(x, out, num_tokens, width, batch_stride, token_stride, WIDTH: tl.constexpr):
    """One program: one row of ``width`` features."""
    row = tl.program_id(0).to(tl.int64)
    source = x + (row // num_tokens) * batch_stride + (row % num_tokens) * token_stride
    tl.store(out + row, _square(source, width, WIDTH))


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Of each row of (B, L, n), whose features lie side by side: (B·L,) fp32."""
    batch, length, width = x.shape
    out = x.new_empty(batch * length, dtype=torch.float32)
    chunk = min(_FEATURES_AT_A_TIME, triton.next_power_of_2(width))
    _sum_of_squares[(len(out),)](
        x, out, length, width, x.stride(0), x.stride(1), WIDTH=chunk, num_warps=4
    )
    return out


@triton.jit
def _normed_at(source, weight, features, exists, scale):
    """Features of a row, normed and rounded as plain torch does."""
    loaded = tl.load(source + features, mask=exists, other=0.0)
    own = tl.load(weight + features, mask=exists, other=0.0).to(tl.float32)
    return (loaded.to(tl.float32) * scale * own).to(loaded.dtype).to(tl.float32)


@triton.jit
def _normed_heads(
    x,
    squares,
    weight,
    rotation,
    out,
    num_tokens,
    width,
    full_width,
    batch_stride,
    token_stride,
    rotation_batch_stride,
    rotation_token_stride,
    rotation_head_stride,
    eps,
    SUMMED: tl.constexpr,
    ROTATES: tl.constexpr,
    DISTANCE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: one row. ``DISTANCE``: in a head, of the two features that turn together."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    source = x + batch * batch_stride + token * token_stride
    square = tl.load(squares + row) if SUMMED else _square(source, width, WIDTH)
    scale = tl.rsqrt(square / full_width + eps)
    for start in range(0, width, WIDTH):
        features = start + tl.arange(0, WIDTH)
        exists = features < width
        found = _normed_at(source, weight, features, exists, scale)
        if ROTATES:
            other = _normed_at(source, weight, features ^ DISTANCE, exists, scale)
            pair = (features % HEAD_DIM) // 2 if DISTANCE == 1 else features % DISTANCE
            angles = rotation + batch * rotation_batch_stride + token * rotation_token_stride
            place = angles + (features // HEAD_DIM) * rotation_head_stride + 2 * pair
            cos = tl.load(place, mask=exists, other=0.0).to(tl.float32)
            sin = tl.load(place + 1, mask=exists, other=0.0).to(tl.float32)
            found = found * cos + tl.where(features & DISTANCE == 0, -other, other) * sin
        tl.store(out + row * width + features, found.to(out.dtype.element_ty), mask=exists)


def normed_heads(heads: Any, squares: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See ``models.layers.normed_over_ranks``: (B, L, N, K) of its ``HeadsOfRank``. CUDA tensors.

    ``squares`` (B·L,) fp32: of all ranks' features; None: this rank has all of them. Head widths
    are powers of two.
    """
    x, rotation, head_dim = heads.x, heads.rotation, heads.head_dim
    batch, length, width = x.shape
    out = x.new_empty(batch, length, width // head_dim, head_dim)
    of_rotation = [0, 0, 0]
    if rotation is not None:
        assert rotation.stride()[3:] == (2, 1)
        axes = zip(rotation.stride()[:3], rotation.shape[:3], strict=True)
        of_rotation = [0 if size == 1 else stride for stride, size in axes]
    chunk = min(_FEATURES_AT_A_TIME, triton.next_power_of_2(width))
    _normed_heads[(batch * length,)](
        x,
        squares,
        heads.weight,
        rotation,
        out,
        length,
        width,
        heads.width,
        x.stride(0),
        x.stride(1),
        *of_rotation,
        eps,
        SUMMED=squares is not None,
        ROTATES=rotation is not None,
        DISTANCE=head_dim // 2 if heads.halves else 1,
        HEAD_DIM=head_dim,
        WIDTH=chunk,
        num_warps=4,
    )
    return out


_COLUMNS_PER_PROGRAM = 1024


@triton.jit
def _attended_and_gelu(
    attended,
    mlp,
    out,
    attended_width,
    mlp_width,
    mlp_stride,
    COLUMNS: tl.constexpr,
):
    """One program: ``COLUMNS`` columns of one row, either of ``attended`` or of ``mlp``."""
    row = tl.program_id(0).to(tl.int64)
    width = attended_width + mlp_width
    first_of_mlp = tl.cdiv(attended_width, COLUMNS)
    if tl.program_id(1) < first_of_mlp:
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        exists = columns < attended_width
        copied = tl.load(attended + row * attended_width + columns, mask=exists)
        tl.store(out + row * width + columns, copied, mask=exists)
    else:
        columns = (tl.program_id(1) - first_of_mlp) * COLUMNS + tl.arange(0, COLUMNS)
        exists = columns < mlp_width
        loaded = tl.load(mlp + row * mlp_stride + columns, mask=exists, other=0.0)
        x = loaded.to(tl.float32)
        # 0.5 (1 + tanh z) is the sigmoid of 2 z.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        place = out + row * width + attended_width + columns
        tl.store(place, x.to(loaded.dtype), mask=exists)


def attended_and_gelu(attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    """(B, L, n) beside GELU, by tanh, of (B, L, m), whose rows may lie apart: (B, L, n + m)."""
    batch, length, attended_width = attended.shape
    mlp_width = mlp.shape[-1]
    assert attended.is_contiguous()
    assert mlp.stride(0) == length * mlp.stride(1)
    out = attended.new_empty(batch, length, attended_width + mlp_width)
    blocks = [triton.cdiv(width, _COLUMNS_PER_PROGRAM) for width in (attended_width, mlp_width)]
    _attended_and_gelu[(batch * length, sum(blocks))](
        attended,
        mlp,
        out,
        attended_width,
        mlp_width,
        mlp.stride(1),
        COLUMNS=_COLUMNS_PER_PROGRAM,
    )
    return out


_NORMS = {"none": 0, "layer": 1, "rms": 2}


@triton.jit
def _residual_norm(
    updates,
    targets,
    tokens,
    gate,
    shift,
    scale,
    update_weight,
    weight,
    bias,
    streams,
    first_row,
    num_tokens,
    num_text,
    num_late,
    width,
    gate_stream_stride,
    gate_batch_stride,
    gate_token_stride,
    norm_stream_stride,
    norm_batch_stride,
    norm_token_stride,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LISTED: tl.constexpr,
    EACH_TOKEN: tl.constexpr,
    GATE: tl.constexpr,
    NORM_UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: one row. ``updates`` and ``targets``: the addresses of every rank's buffer."""
    features = tl.arange(0, WIDTH)
    exists = features < width
    row = first_row + tl.program_id(0)
    place = row.to(tl.int64) * width + features
    dtype = tokens.dtype.element_ty

    update = tl.zeros((WIDTH,), tl.float32)
    for rank in tl.static_range(RANKS):
        address = tl.load(updates + rank).to(tl.pointer_type(dtype))
        part = tl.load(tl.multiple_of(address, 16) + place, mask=exists, other=0.0)
        update += part.to(tl.float32)

    # In 64 bits: with a row for each token these places are beyond 2**31 in videos.
    batch = (row // num_tokens).to(tl.int64)
    token = (row % num_tokens).to(tl.int64)
    if LISTED:
        stream = tl.load(streams + token)
    else:
        stream = (token >= num_text).to(tl.int64) + (token >= num_tokens - num_late).to(tl.int64)
    of_gate = stream * gate_stream_stride + batch * gate_batch_stride + features
    of_norm = stream * norm_stream_stride + batch * norm_batch_stride + features
    if EACH_TOKEN:
        of_gate += token * gate_token_stride
        of_norm += token * norm_token_stride
    factor = tl.full((WIDTH,), 1.0, tl.float32)
    if GATE:
        factor = tl.load(gate + of_gate, mask=exists, other=0.0).to(tl.float32)
    if NORM_UPDATE:
        mean_square = tl.sum(update * update, axis=0) / width
        own = tl.load(update_weight + features, mask=exists, other=0.0).to(tl.float32)
        update = update * tl.rsqrt(mean_square + eps) * own
        if GATE:
            # tanh, which Triton has under one name for all devices only by way of exp.
            factor = 1 - 2 / (tl.exp(2 * factor) + 1)
    x = tl.load(tokens + place, mask=exists, other=0.0).to(tl.float32) + update * factor
    if LIMIT:
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -65504.0), 65504.0), 0.0)
    tl.store(tokens + place, x.to(dtype), mask=exists)

    if NORM > 0:
        if NORM == 1:
            x = tl.where(exists, x - tl.sum(x, axis=0) / width, 0.0)
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        # Loaded after the sums: in registers before them, they would let fewer rows run at once.
        move = tl.zeros((WIDTH,), tl.float32)
        stretch = tl.zeros((WIDTH,), tl.float32)
        if SHIFT:
            move = tl.load(shift + of_norm, mask=exists, other=0.0).to(tl.float32)
        if SCALE:
            stretch = tl.load(scale + of_norm, mask=exists, other=0.0).to(tl.float32)
        x = x * inverse
        if WEIGHT:
            x = x * tl.load(weight + features, mask=exists, other=0.0).to(tl.float32)
        if BIAS:
            x = x + tl.load(bias + features, mask=exists, other=0.0).to(tl.float32)
        x = x * (1 + stretch) + move
    for distance in tl.static_range(RANKS):
        address = tl.load(targets + (RANK + distance) % RANKS).to(tl.pointer_type(dtype))
        tl.store(tl.multiple_of(address, 16) + place, x.to(dtype), mask=exists)


def residual_norm(
    updates: torch.Tensor,
    targets: torch.Tensor,
    tokens: torch.Tensor,
    epilogue: Epilogue,
    num_text: int,
    rank: int,
    num_ranks: int,
) -> None:
    """This rank's share of the rows of ``models.layers.residual_norm``, to every rank.

    ``updates``, ``targets`` (num_ranks,) int64: addresses of buffers as large as ``tokens``; all
    ranks' updates are summed, and the result goes to all targets. ``tokens`` (B, L, D) changes in
    the rows of this rank only; the first ``num_text`` of each item are stream 0, the others 1,
    but for the epilogue's last ``num_late``, and where it lists the stream of each token.
    """
    batch, num_tokens, width = tokens.shape
    rows = batch * num_tokens
    share = -(-rows // num_ranks)
    num_rows = min(share, rows - rank * share)
    if num_rows <= 0:
        return
    scale, shift = epilogue.scale, epilogue.shift
    assert shift is None or scale is None or strides(shift) == strides(scale)
    of_gate, of_norm = strides(epilogue.gate), strides(shift if scale is None else scale)
    _residual_norm[(num_rows,)](
        updates,
        targets,
        tokens,
        epilogue.gate,
        shift,
        scale,
        epilogue.update_weight,
        epilogue.weight,
        epilogue.bias,
        epilogue.streams,
        rank * share,
        num_tokens,
        num_text,
        epilogue.num_late,
        width,
        *of_gate,
        *of_norm,
        epilogue.eps,
        RANK=rank,
        RANKS=num_ranks,
        LISTED=epilogue.streams is not None,
        EACH_TOKEN=of_gate[2] > 0 or of_norm[2] > 0,
        GATE=epilogue.gate is not None,
        NORM_UPDATE=epilogue.update_weight is not None,
        NORM=_NORMS[epilogue.norm],
        WEIGHT=epilogue.weight is not None,
        BIAS=epilogue.bias is not None,
        SCALE=scale is not None,
        SHIFT=shift is not None,
        LIMIT=epilogue.limit and tokens.dtype == torch.float16,
        WIDTH=triton.next_power_of_2(width),
        num_warps=8,
    )
