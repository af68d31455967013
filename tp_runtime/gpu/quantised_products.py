"""Products on tensor cores for int8 and fp8, with inputs quantised token by token. GPUs only.

``quantised_rows`` is one kernel: it finds the largest of each token's features, and rounds all to
int8 or fp8. The products take a scale for each token and one for each output. What ConvRot rotates
before is a product of its own: with 4,608 x 12,288 features on an H200 both together take 0.12 ms,
and a kernel that did all, with the rotation twice, 0.17.
``rank/quantised_arithmetic.py`` has the same in plain torch.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from vllm import _custom_ops as vllm_ops

from ..formats import FP8_SINCE, INT8_SINCE
from .graphs import fused
from .rotation import rotated

logger = logging.getLogger("tp_runtime.gpu.quantised_products")

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_TOKENS = 1  # of one program
_ALIGNED = 16  # features that the products take at a time
_LEAST_TOKENS = 32  # of torch's product in int8, which takes no fewer than 17


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


def can_multiply(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether ``x`` can be multiplied in ``dtype``, int8 or fp8, with a weight (rows, columns)."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and all(size % _ALIGNED == 0 for size in weight.shape)
        and _kernel(dtype, x.dtype, x.device) is not None
    )


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    rotation: int = 0,
) -> torch.Tensor:
    """(..., columns) by an int8 or fp8 weight (rows, columns), scales (rows,) fp32: (..., rows).

    Only what ``can_multiply``. ``rotation``: the weight's columns are rotated in groups of so many.
    """
    if not x.numel():  # a rank may have none of a stream's tokens; CUTLASS divides by their number
        return x.new_empty(*x.shape[:-1], len(weight))
    kernel = _kernel(weight.dtype, x.dtype, x.device)
    assert kernel is not None
    rows, x_scale = quantised_rows(rotated(x.flatten(0, -2), rotation), weight.dtype)
    found = kernel(rows, weight, x_scale, scale.view(1, -1), bias, x.dtype)
    return found.unflatten(0, x.shape[:-1])


# --- kernels -------------------------------------------------------------------------------------

# (tokens, columns) and a weight (rows, columns) in int8 or fp8, their scales (tokens, 1) and
# (1, rows) in fp32, a bias (rows,) or None, a dtype → (tokens, rows) in that dtype.
Kernel = Callable[..., torch.Tensor]


def by_cutlass(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """vLLM's; int8 up to compute capability 9."""
    return vllm_ops.cutlass_scaled_mm(codes, weight.t(), x_scale, scale, dtype, bias)


def by_scaled_mm(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """torch's, fp8 only."""
    return torch._scaled_mm(
        codes, weight.t(), x_scale, scale, bias=bias, out_dtype=dtype, use_fast_accum=True
    )


def by_int_mm(
    codes: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """torch's (cuBLAS), int8 only: sums in int32, which another kernel scales."""
    num_tokens = len(codes)
    if num_tokens < _LEAST_TOKENS:
        codes = F.pad(codes, (0, 0, 0, _LEAST_TOKENS - num_tokens))
    sums = torch._int_mm(codes, weight.t())[:num_tokens]
    return _scaled(sums, x_scale, scale, bias, dtype)


@fused
def _scaled(
    sums: torch.Tensor,
    x_scale: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    found = sums.float() * x_scale * scale
    return (found if bias is None else found + bias.float()).to(dtype)


def kernels_for(dtype: torch.dtype, results: torch.dtype) -> tuple[Kernel, ...]:
    """Those that multiply in ``dtype``, to bf16 or fp16; the fastest first."""
    if dtype == torch.int8:
        return by_cutlass, by_int_mm
    # With scales of rows, torch multiplies fp8 to bf16 only.
    return (by_scaled_mm, by_cutlass) if results == torch.bfloat16 else (by_cutlass,)


@cache
def _kernel(dtype: torch.dtype, results: torch.dtype, device: torch.device) -> Kernel | None:
    """The first that works on the GPU; None: its tensor cores do not multiply in that dtype.

    Asked for in the evaluation before the one that is recorded.
    """
    since = INT8_SINCE if dtype == torch.int8 else FP8_SINCE
    if torch.cuda.get_device_capability(device) < since:
        return None
    return first_right(kernels_for(dtype, results), dtype, device, results)


def first_right(
    kernels: Sequence[Kernel],
    dtype: torch.dtype,
    device: torch.device,
    results: torch.dtype = torch.bfloat16,
) -> Kernel | None:
    """The first of the kernels that computes a small product right on that device.

    Which GPUs a release of vLLM or torch has kernels for, only trying tells.
    """
    generator = torch.Generator().manual_seed(0)
    codes, weight = (
        (30 * torch.randn(size, 64, generator=generator)).round().clamp(-127, 127).to(device, dtype)
        for size in (48, 32)
    )
    x_scale = torch.rand(48, 1, generator=generator).to(device) + 0.5
    scale = torch.rand(1, 32, generator=generator).to(device) + 0.5
    expected = (codes.float() * x_scale) @ (weight.float() * scale.t()).t()
    for kernel in kernels:
        try:
            found = kernel(codes, weight, x_scale, scale, None, results).float()
        except RuntimeError as error:
            logger.info("%s in %s on %s: %s", kernel.__name__, dtype, device, error)
            continue
        if (found - expected).norm() <= 0.01 * expected.norm():
            return kernel
        logger.warning("%s in %s on %s: wrong results", kernel.__name__, dtype, device)
    logger.warning("No products in %s on %s: weights are dequantised at every use.", dtype, device)
    return None
