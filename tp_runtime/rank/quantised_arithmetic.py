"""Quantised weights: their values, products with them, and how changed values are quantised again.

The numbers are those of ComfyUI 0.33 and comfy-kitchen 0.2.31 on a CPU (``backends/eager/``), for
weights that are split. Tensors are a rank's, or a whole weight's, by the names of ``formats.py``.
``linears``: how many rows belong to each linear of a fused layer.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from ..formats import INT8, MXFP8, NVFP4, W4A4, W4A8, LayerFormat
from ..gpu.graphs import fused
from ..gpu.rotation import rotated

Tensors = Mapping[str, torch.Tensor]

# The values of four bits in nvfp4 (E2M1): a sign, and these.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_INTEGERS = (INT8, W4A4, W4A8)
INT8_LIMIT, INT4_LIMIT = 127.0, 7.0
# fp32 adds up products of int8 without rounding as long as the sum stays below 2^24.
_EXACT_IN_FP32 = 2**24 // 127**2


# --- values --------------------------------------------------------------------------------------


def dequantised(
    layer_format: LayerFormat, tensors: Tensors, dtype: torch.dtype, linears: Sequence[int] = ()
) -> torch.Tensor:
    """The weight's values (rows, columns), as ComfyUI computes them, in ``dtype``."""
    name, weight = layer_format.name, tensors["weight"]
    if name == MXFP8:
        blocks = weight.float().unflatten(1, (-1, layer_format.block))
        return (blocks * tensors["block_scale"].float()[..., None]).flatten(1).to(dtype)
    if name == NVFP4:
        scale = tensors["weight_scale"].to(dtype)[:, None] * tensors["block_scale"].to(dtype)
        blocks = _e2m1(weight, dtype).unflatten(1, (-1, layer_format.block))
        return (blocks * scale[..., None]).flatten(1)
    if name in _INTEGERS:
        codes = codes_of(layer_format, tensors, linears)
        values = codes.float() * tensors["weight_scale"][:, None]
        if name == W4A8:  # ComfyUI rotates these in the dtype that it asks for
            values = values.to(dtype)
        return rotated(values, layer_format.rotation).to(dtype)
    return _scaled(weight, tensors["weight_scale"], dtype)


@fused
def _scaled(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (weight.to(torch.float32) * scale[:, None]).to(dtype)


def smoothed(values: torch.Tensor, tensors: Tensors, linears: Sequence[int] = ()) -> torch.Tensor:
    """The values, changed in place: with what each linear's input is multiplied by, if any."""
    scales = tensors.get("pre_quant_scale")
    if scales is not None:
        rows = values.split(list(linears) or [len(values)])
        for scale, of_linear in zip(scales, rows, strict=True):
            of_linear *= scale.to(values.dtype)
    return values


def codes_of(
    layer_format: LayerFormat, tensors: Tensors, linears: Sequence[int] = ()
) -> torch.Tensor:
    """int8 (rows, columns) that the scales of rows belong to."""
    weight = tensors["weight"]
    if layer_format.name == INT8:
        return weight
    low, high = weight & 0xF, (weight >> 4) & 0xF
    four_bits = torch.stack((low, high), dim=-1).flatten(1)
    if layer_format.name == W4A4:
        return torch.where(four_bits >= 8, four_bits - 16, four_bits)
    assert layer_format.name == W4A8, layer_format
    if "codebook" in tensors:
        codebook, start, rows = tensors["codebook"], 0, []
        for linear, length in enumerate(linears or (len(four_bits),)):
            rows.append(codebook[linear][four_bits[start : start + length].int()])
            start += length
        values = torch.cat(rows)
    else:
        values = four_bits.float() - 8.0
    blocks = (
        values.unflatten(1, (-1, layer_format.block)) * tensors["block_scale"].float()[..., None]
    )
    return blocks.flatten(1).round().clamp(-127, 127).to(torch.int8)


@cache  # from the host, so a CUDA graph could not record it
def _e2m1_numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The (16,) that four bits stand for."""
    return torch.tensor([*_E2M1, *(-x for x in _E2M1)], dtype=dtype, device=device)


def _e2m1(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, bytes) → (rows, 2 · bytes): the upper four bits come first."""
    numbers = _e2m1_numbers(dtype, packed.device)
    return numbers[torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten(1).int()]


# --- products ------------------------------------------------------------------------------------


def product(
    layer_format: LayerFormat,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    linears: Sequence[int],
    *,
    of_integers: bool,
) -> torch.Tensor:
    """(..., columns) → (..., rows), as ComfyUI computes it where no kernel serves the format.

    ``of_integers``: int8 and int4 weights are multiplied by an input that is quantised, too: token
    by token, over this rank's features. Under a row cut that is finer than over all features, and
    needs no exchange (docs/formats.md). If not, they are dequantised, and the input is rotated in
    their place, which is smaller.
    """
    if layer_format.name in _INTEGERS and not layer_format.full_precision:
        x = rotated(x, layer_format.rotation)
        codes, scale = codes_of(layer_format, tensors, linears), tensors["weight_scale"]
        if not of_integers:
            return F.linear(x, _scaled(codes, scale, x.dtype), bias)
        if layer_format.name == W4A4:
            return _int4_product(x, codes, scale, bias)
        return _int8_product(x, codes, scale, bias)
    values = dequantised(layer_format, tensors, x.dtype, linears)
    return F.linear(x, smoothed(values, tensors, linears), bias)


def _int8_product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    x_scale = (x.abs().amax(dim=-1, keepdim=True).float() / INT8_LIMIT).clamp(min=1e-30)
    x_codes = (x / x_scale.to(x.dtype)).round().clamp(-128, 127)
    # In floats, which a CPU multiplies faster than torch does int8; and as exactly.
    sums = torch.float32 if codes.shape[1] <= _EXACT_IN_FP32 else torch.float64
    found = F.linear(x_codes.to(sums), codes.to(sums)).float()
    found = (found * (x_scale * scale)).to(x.dtype)
    return found if bias is None else found + bias


def _int4_product(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    x_scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / INT4_LIMIT
    x_codes = (x / x_scale).round().clamp(-INT4_LIMIT, INT4_LIMIT)
    found = F.linear(x_codes, codes.to(x.dtype)) * x_scale * scale.to(x.dtype)
    return found if bias is None else found + bias
