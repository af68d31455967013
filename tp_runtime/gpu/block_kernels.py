"""``block_codes`` as kernels for GPUs: the same functions, and the same bits.

Each is one pass over memory. They take and give what plain torch does, of which a test holds them
to every bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .block_codes import (
    BLOCK,
    BLOCK_BYTES,
    INFINITE,
    LEVELS,
    NOT_A_NUMBER,
    SMALLEST_SCALE,
    num_blocks,
)

_BLOCKS_PER_PROGRAM = 64
# A product and a sum are rounded each for itself, as in plain torch.
_OPTIONS: Any = {"enable_fp_fusion": False}

# What kernels may read of this module.
_BLOCK = tl.constexpr(BLOCK)
_BLOCK_BYTES = tl.constexpr(BLOCK_BYTES)
_LEVELS = tl.constexpr(float(LEVELS))
_INFINITE = tl.constexpr(INFINITE)
_NOT_A_NUMBER = tl.constexpr(NOT_A_NUMBER)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _places(segments, blocks, share):
    """Of blocks: where their codes are (blocks, BLOCK), and their scales."""
    start = (blocks // share).to(tl.int64) * share * _BLOCK_BYTES
    within = blocks % share
    features = tl.arange(0, _BLOCK)
    codes = (start + within * _BLOCK)[:, None] + features[None, :]
    scales = (segments + start + share * _BLOCK).to(tl.pointer_type(tl.bfloat16)) + within
    return segments.to(tl.pointer_type(tl.int8)) + codes, scales


@triton.jit
def _store_codes(numbers, codes, scales, exist):
    sizes = tl.abs(numbers)
    finite = sizes < float("inf")
    largest = tl.max(tl.where(finite, sizes, 0.0), axis=1)
    scale = tl.maximum(tl.div_rn(largest, _LEVELS), _SMALLEST_SCALE)
    # To the nearest of bf16, and to even, which Triton's interpreter does not do by itself.
    bits = scale.to(tl.int32, bitcast=True)
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    tl.store(scales, scale.to(tl.bfloat16), mask=exist)
    inverse = tl.div_rn(tl.full(largest.shape, 1.0, tl.float32), scale)
    code = tl.minimum(tl.maximum(numbers * inverse[:, None], -_LEVELS), _LEVELS)
    # To the nearest, and to even: what is added leaves no room for a fraction.
    code = (code + 12582912.0) - 12582912.0
    code = tl.where(finite, code, tl.where(numbers > 0, 1.0 * _INFINITE, -1.0 * _INFINITE))
    code = tl.where(numbers == numbers, code, 1.0 * _NOT_A_NUMBER)
    tl.store(codes, code.to(tl.int8), mask=exist[:, None])


@triton.jit
def _load_numbers(codes, scales, exist):
    code = tl.load(codes, mask=exist[:, None], other=0).to(tl.int32)
    scale = tl.load(scales, mask=exist, other=0.0).to(tl.float32)
    found = code.to(tl.float32) * scale[:, None]
    found = tl.where(code == _INFINITE, float("inf"), found)
    found = tl.where(code == -_INFINITE, float("-inf"), found)
    return tl.where(code == _NOT_A_NUMBER, float("nan"), found)


@triton.jit
def _encode(x, segments, size, count, first, share, BLOCKS: tl.constexpr):
    """One program: ``BLOCKS`` blocks of ``x``."""
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    places = blocks.to(tl.int64)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    numbers = tl.load(x + places, mask=places < size, other=0.0).to(tl.float32)
    codes, scales = _places(segments, first + blocks, share)
    _store_codes(numbers, codes, scales, blocks < count)


@triton.jit
def _add_up(given, segment, share, RANKS: tl.constexpr, BLOCKS: tl.constexpr):
    """One program: ``BLOCKS`` blocks of all ranks."""
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    exist = blocks < share
    total = tl.zeros((BLOCKS, _BLOCK), tl.float32)
    for rank in tl.static_range(RANKS):
        codes, scales = _places(given, rank * share + blocks, share)
        total += _load_numbers(codes, scales, exist)
    codes, scales = _places(segment, blocks, share)
    _store_codes(total, codes, scales, exist)


@triton.jit
def _decode(x, segments, size, count, first, share, BLOCKS: tl.constexpr):
    """One program: ``BLOCKS`` blocks of ``x``."""
    blocks = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    codes, scales = _places(segments, first + blocks, share)
    numbers = _load_numbers(codes, scales, blocks < count)
    places = blocks.to(tl.int64)[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    tl.store(x + places, numbers.to(x.dtype.element_ty), mask=places < size)


def encode(x: torch.Tensor, segments: torch.Tensor, first: int = 0) -> None:
    """See ``block_codes.encode``."""
    _over_blocks(_encode, x, segments, first)


def add_up(given: torch.Tensor, segment: torch.Tensor) -> None:
    """See ``block_codes.add_up``."""
    share = len(segment) // BLOCK_BYTES
    _add_up[(triton.cdiv(share, _BLOCKS_PER_PROGRAM),)](
        given, segment, share, RANKS=len(given), BLOCKS=_BLOCKS_PER_PROGRAM, **_OPTIONS
    )


def decode(segments: torch.Tensor, x: torch.Tensor, first: int = 0) -> None:
    """See ``block_codes.decode``."""
    _over_blocks(_decode, x, segments, first)


def _over_blocks(kernel: Any, x: torch.Tensor, segments: torch.Tensor, first: int) -> None:
    """Run a kernel over all blocks of ``x``, which lie in ``segments`` from block ``first`` on."""
    assert x.is_contiguous()
    count = num_blocks(x.numel())
    if count:
        kernel[(triton.cdiv(count, _BLOCKS_PER_PROGRAM),)](
            x,
            segments,
            x.numel(),
            count,
            first,
            segments.shape[1] // BLOCK_BYTES,
            BLOCKS=_BLOCKS_PER_PROGRAM,
            **_OPTIONS,
        )
