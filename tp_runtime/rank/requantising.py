"""Quantises the changed values of a whole weight again, as ComfyUI 0.33 does after patching it.

Rounding is up or down by chance, with a seed: the same random numbers in the same places, on a CPU,
as ComfyUI and comfy-kitchen 0.2.31 (``backends/eager/``) take.
"""

import sys
from typing import Any

import torch

from ..errors import CheckpointError
from ..formats import INT8, MXFP8, NVFP4, W4A4, W4A8, LayerFormat, QuantisedWeight
from ..gpu.rotation import rotated
from ..wire.protocol import PatchedWeight
from ..wire.weight_patches import rounded, rounded_to_fp4
from .quantised_arithmetic import INT4_LIMIT, INT8_LIMIT, Tensors

_E2M1_LIMIT, _E4M3_LIMIT = 6.0, 448.0


def check_requantising(layer_format: LayerFormat) -> None:
    """Look whether changed values can be quantised so again.

    Raises:
        CheckpointError: the package that does it for the format is not installed.
    """
    if layer_format.name != W4A8:
        return
    try:
        import comfy_kitchen  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"A LoRA on a weight in {layer_format.name} needs the package 'comfy-kitchen' in the "
            f"Python of the group's ranks, {sys.executable} ({error}). Run: {sys.executable} -m "
            "pip install comfy-kitchen"
        ) from error


def requantised(
    weight: QuantisedWeight,
    values: torch.Tensor,
    before: Tensors,
    change: PatchedWeight,
) -> dict[str, torch.Tensor]:
    """The weight and its companions for new values (rows, columns) in fp32.

    Companions that patching does not change are those of ``before``. ``change`` says how to round:
    ``by_bytes`` and ``keeps_scale`` count for formats that older releases of ComfyUI read, too.
    Only of formats that ``check_requantising`` has let pass.
    """
    layer_format = weight.format
    name, seed = layer_format.name, change.seed
    if name in (MXFP8, NVFP4):
        return {**before, **_in_blocks(layer_format, values, seed)}
    if name == W4A8:
        return {**before, **_with_codebook(layer_format, values, before, seed)}
    if name in (INT8, W4A4):
        return _in_integers(weight, rotated(values, layer_format.rotation), seed)
    dtype, scale = before["weight"].dtype, before["weight_scale"]
    if weight.first_format and change.keeps_scale:
        values = values / scale[:, None]
    else:
        one = values.abs().amax() / torch.finfo(dtype).max
        values, scale = values * (1.0 / one), one.expand(len(values))
    return {"weight": rounded(values, dtype, seed, change.by_bytes), "weight_scale": scale}


def _in_integers(
    weight: QuantisedWeight, values: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """Of rotated values."""
    largest = values.abs().amax() if weight.one_scale else values.abs().amax(dim=1, keepdim=True)
    if weight.format.name == W4A4:
        scale = largest.clamp(min=1e-10) / INT4_LIMIT
        lowest, highest = -INT4_LIMIT, INT4_LIMIT
    else:
        scale = (largest / INT8_LIMIT).clamp(min=1e-30)
        lowest, highest = -INT8_LIMIT - 1, INT8_LIMIT
    generator = torch.Generator(device=values.device).manual_seed(seed)
    chance = torch.rand(values.shape, device=values.device, generator=generator)
    codes = (values / scale + chance).floor().clamp(lowest, highest).to(torch.int8)
    if weight.format.name == W4A4:
        codes = (codes[:, 0::2] & 0xF) | (codes[:, 1::2] << 4)
    return {"weight": codes, "weight_scale": scale.reshape(-1).expand(len(values))}


def _in_blocks(
    layer_format: LayerFormat, values: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    blocks = values.unflatten(1, (-1, layer_format.block))
    largest = blocks.abs().amax(dim=-1)
    if layer_format.name == MXFP8:  # a scale is a power of two, stored as its exponent
        exponent = (largest / _E4M3_LIMIT).clamp(min=2.0**-127).log2().ceil().int() + 127
        exponent = torch.where(largest == 0, 127, exponent.clamp(0, 254))
        scale = (exponent << 23).view(torch.float32)
        scaled = (blocks / scale[..., None]).flatten(1)
        codes = rounded(scaled, torch.float8_e4m3fn, seed, by_bytes=True)
        stored = torch.where(largest == 0, 0, exponent).to(torch.uint8)
        return {"weight": codes, "block_scale": stored.view(torch.float8_e8m0fnu)}
    whole = values.abs().amax() / (_E4M3_LIMIT * _E2M1_LIMIT)
    scale = (largest / _E2M1_LIMIT / whole).clamp(max=_E4M3_LIMIT).to(torch.float8_e4m3fn)
    scaled = (blocks / (whole * scale.float())[..., None]).flatten(1).nan_to_num()
    codes = rounded_to_fp4(scaled, seed)
    return {"weight": codes, "block_scale": scale, "weight_scale": whole.expand(len(values))}


def _with_codebook(
    layer_format: LayerFormat, values: torch.Tensor, before: Tensors, seed: int
) -> dict[str, torch.Tensor]:
    import comfy_kitchen as kitchen

    codebook: Any = before["codebook"][0] if "codebook" in before else None
    codes, blocks, scale, _, _ = kitchen.quantize_w4a8_int8_weight(
        values,
        layer_format.block,
        layer_format.rotation,
        scale_dtype=before["block_scale"].dtype,
        codebook=codebook is not None,
        codebook_tensor=codebook,
        stochastic_rounding=seed,
    )
    return {"weight": codes, "block_scale": blocks, "weight_scale": scale}
