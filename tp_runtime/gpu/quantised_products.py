"""Products on tensor cores for int8 and fp8, with inputs quantised token by token. GPUs only.

``quantised_rows`` is one kernel: it finds the largest of each token's features, and rounds all to
int8 or fp8. The products take a scale for each token and one for each output. What ConvRot rotates
before is a product of its own: with 4,608 x 12,288 features on an H200 both together take 0.12 ms,
and a kernel that did all, with the rotation twice, 0.17.
``rank/quantised_arithmetic.py`` has the same in plain torch.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from vllm import _custom_ops as vllm_ops

from ..formats import FP8_SINCE, INT8_SINCE
from .rotation import rotated

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_TOKENS = 1  # of one program
_ALIGNED = 16  # features that the products take at a time


@triton.jit
def _quantised_rows(
    x,
    codes,
    scales,
    num_tokens,
    width,
    stride,
    LIMIT: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """One program: ``TOKENS`` tokens, ``FEATURES`` features at a time, twice: the second time from
    the cache.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    features = tl.arange(0, FEATURES)
    exists = (tokens < num_tokens)[:, None]
    source = x + tokens.to(tl.int64)[:, None] * stride
    target = codes + tokens.to(tl.int64)[:, None] * width
    largest = tl.zeros((TOKENS,), dtype=tl.float32)
    for start in range(0, width, FEATURES):
        here = (start + features)[None, :]
        values = tl.load(source + here, mask=exists & (here < width), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(values), axis=1))
    scale = tl.maximum(largest / LIMIT, 1e-30)
    tl.store(scales + tokens, scale, mask=tokens < num_tokens)
    for start in range(0, width, FEATURES):
        here = (start + features)[None, :]
        values = tl.load(source + here, mask=exists & (here < width), other=0.0).to(tl.float32)
        values = tl.minimum(tl.maximum(values / scale[:, None], -LIMIT), LIMIT)
        if ROUNDS:  # to the nearest, and to even: what is added leaves no room for a fraction
            values = (values + 12582912.0) - 12582912.0
        tl.store(target + here, values.to(codes.dtype.element_ty), mask=exists & (here < width))


def quantised_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, features) → the same in int8 or fp8, and each token's scale (tokens, 1) in fp32."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    num_tokens, width = x.shape
    codes = torch.empty(num_tokens, width, dtype=dtype, device=x.device)
    scales = torch.empty(num_tokens, 1, dtype=torch.float32, device=x.device)
    _quantised_rows[(triton.cdiv(num_tokens, _TOKENS),)](
        x,
        codes,
        scales,
        num_tokens,
        width,
        x.stride(0),
        LIMIT=_LIMITS[dtype],
        TOKENS=_TOKENS,
        FEATURES=min(4096, _power_of_2(width)),
        ROUNDS=dtype == torch.int8,
        num_warps=8,
    )
    return codes, scales


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def can_multiply(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``x`` can be multiplied in ``dtype``, int8 or fp8, with a weight (rows, columns)."""
    since = INT8_SINCE if dtype == torch.int8 else FP8_SINCE
    # By rows, torch multiplies fp8 to bf16 only; vLLM int8 to fp16, too.
    results = (torch.bfloat16, torch.float16) if dtype == torch.int8 else (torch.bfloat16,)
    return (
        x.is_cuda
        and x.dtype in results
        and _capability(x.device) >= since
        and all(size % _ALIGNED == 0 for size in weight.shape)
    )


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rotation: int = 0,
) -> torch.Tensor:
    """(..., columns) by an int8 or fp8 weight (rows, columns), scales (rows,) fp32: (..., rows).

    ``rotation``: the weight's columns are rotated in groups of so many.
    """
    rows, x_scale = quantised_rows(rotated(x.flatten(0, -2), rotation), weight.dtype)
    found = multiplied(rows, x_scale, weight, scale, bias, x.dtype)
    return found.unflatten(0, x.shape[:-1])


def multiplied(
    rows: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What ``quantised_rows`` gave, by a weight of its dtype: (tokens, rows) in ``dtype``."""
    scales = x_scale, scale.view(1, -1)
    if weight.dtype == torch.int8:
        return vllm_ops.cutlass_scaled_mm(rows, weight.t(), *scales, dtype, bias)
    return torch._scaled_mm(
        rows, weight.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=True
    )
