"""The one GPU kernel of our own: norm and rotary embedding of query and key heads. Rank half.

Written by hand because the compiler makes of it a reduction that reads at a quarter of the
memory's speed (measured on an H200, see ``bench/RESULTS.md``). ``rotated_heads`` of
``models/common.py`` is the same in plain torch, and what this must equal.
"""

from typing import Any

import torch
import triton
import triton.language as tl

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
    first_token,
    qkv_batch_stride,
    qkv_token_stride,
    out_stride,
    out_batch_stride,
    eps,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
):
    """One program: ``HEADS`` heads of one token of q (axis 2: 0), k (1) or v (2, copied)."""
    token = tl.program_id(0) % num_tokens
    batch = tl.program_id(0) // num_tokens
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    which = tl.program_id(2)
    features = tl.arange(0, HEAD_DIM)
    places = heads[:, None] * HEAD_DIM + features[None, :]
    exists = (heads < num_heads)[:, None]
    width = num_heads * HEAD_DIM

    source = qkv + batch.to(tl.int64) * qkv_batch_stride + token.to(tl.int64) * qkv_token_stride
    loaded = tl.load(source + which * width + places, mask=exists, other=0.0)
    position = (first_token + token).to(tl.int64)
    target = out + which * out_stride + batch.to(tl.int64) * out_batch_stride + position * width
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``models.common.rotated_heads``. CUDA tensors; head widths that are powers of two."""
    batch, _, _, num_heads, head_dim = parts[0][0].shape
    total = sum(part[0].shape[1] for part in parts)
    # A single part's v needs no copy: attention reads it where it is.
    copies = 2 if len(parts) == 1 else 3
    first = parts[0][0]
    out = first.new_empty(copies, batch, total, num_heads, head_dim)
    start = 0
    for qkv, norm_q, norm_k in parts:
        length = qkv.shape[1]
        grid: Any = (batch * length, triton.cdiv(num_heads, _HEADS_PER_PROGRAM), copies)
        _norm_rotate[grid](
            qkv,
            norm_q,
            norm_k,
            rotation,
            out,
            length,
            num_heads,
            start,
            qkv.stride(0),
            qkv.stride(1),
            out.stride(0),
            out.stride(1),
            eps,
            HEAD_DIM=head_dim,
            HEADS=_HEADS_PER_PROGRAM,
        )
        start += length
    return out[0], out[1], out[2] if copies == 3 else first[:, :, 2]
