"""Tiny model files in each of ComfyUI's quantised formats, as the published ones are.

Quantised by comfy-kitchen, which made those: every weight of a linear whose columns the format's
groups divide, unless it is kept. The others stay as they are, so every file is a mixed one. Of four
bits are those of blocks only: ComfyUI reads the model's sizes from the shapes of the others.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tp_runtime.files.quantised import companion_values, find_quantised
from tp_runtime.files.safetensors_file import DTYPES, TensorInfo
from tp_runtime.formats import QuantisedWeight

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# Tiny models have heads of 16 features: ConvRot's groups are as many, where 256 are usual.
ROTATION = 16
Saying = Literal["comfy_quant", "metadata"]
Quantised = tuple[dict[str, torch.Tensor], dict[str, Any]]


def int8(weight: torch.Tensor) -> Quantised:
    """One scale a row."""
    codes, scale = _kitchen().quantize_int8_rowwise(weight)
    return {"weight": codes, "weight_scale": scale}, {"format": "int8_tensorwise"}


def int8_scalar(weight: torch.Tensor) -> Quantised:
    """One scale for the weight."""
    codes, scale = _kitchen().quantize_int8_tensorwise(weight)
    return {"weight": codes, "weight_scale": scale}, {"format": "int8_tensorwise"}


def int8_convrot(weight: torch.Tensor, group: int = ROTATION) -> Quantised:
    """Rotated, one scale a row."""
    layout = _kitchen().tensor.TensorWiseINT8Layout
    codes, params = layout.quantize(weight, per_channel=True, convrot=True, convrot_groupsize=group)
    said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    return {"weight": codes, "weight_scale": params.scale}, said


def int8_convrot_64(weight: torch.Tensor) -> Quantised:
    """The same in groups of four heads, within which a rank's heads may end."""
    return int8_convrot(weight, 4 * ROTATION)


def int8_exact(weight: torch.Tensor) -> Quantised:
    """Rotated, and to be dequantised at every use, as a file may ask."""
    tensors, said = int8_convrot(weight)
    return tensors, said | {"full_precision_matrix_mult": True}


def fp8(weight: torch.Tensor, dtype: torch.dtype = E4M3) -> Quantised:
    """One scale for the weight, and one for its input."""
    scale = (weight.abs().max() / torch.finfo(dtype).max).float()
    tensors = {"weight": (weight / scale).to(dtype), "weight_scale": scale}
    said = {"format": str(dtype).removeprefix("torch.")}
    return tensors | {"input_scale": torch.tensor(0.05)}, said


def fp8_e5m2(weight: torch.Tensor) -> Quantised:
    """The same with fewer bits."""
    return fp8(weight, E5M2)


def mxfp8(weight: torch.Tensor) -> Quantised:
    """Blocks of 32, scaled by powers of two, in cuBLAS's tiles."""
    codes, scale = _kitchen().quantize_mxfp8(weight, pad_32x=True)
    return {"weight": codes, "weight_scale": scale.view(torch.uint8)}, {"format": "mxfp8"}


def nvfp4(weight: torch.Tensor) -> Quantised:
    """Blocks of 16, scaled in fp8, in cuBLAS's tiles; and a scale for the weight."""
    whole = weight.abs().max().float() / (448 * 6)
    codes, scale = _kitchen().quantize_nvfp4(weight, whole, pad_16x=True)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": whole}
    return tensors, {"format": "nvfp4"}


def nvfp4_awq(weight: torch.Tensor) -> Quantised:
    """The same, with columns evened out before, which the layer's input makes up for."""
    exact = weight.abs().double()  # the order of additions is the CPU's
    smooth = (exact.mean(0) / exact.mean()).sqrt().float()
    tensors, said = nvfp4(weight / smooth)
    return tensors | {"pre_quant_scale": smooth}, said


def w4a4(weight: torch.Tensor) -> Quantised:
    """Rotated, four bits, one scale a row."""
    codes, scale = _kitchen().quantize_convrot_w4a4_weight(weight, ROTATION)
    said = {"format": "convrot_w4a4", "params": {"convrot_groupsize": ROTATION}}
    return {"weight": codes, "weight_scale": scale}, said


def w4a8(weight: torch.Tensor, codebook: bool = True) -> Quantised:
    """Rotated, four bits of a codebook, scales for blocks of 16 and for rows."""
    codes, blocks, rows, _, numbers = _kitchen().quantize_w4a8_int8_weight(
        weight, 16, ROTATION, codebook=codebook
    )
    tensors = {"weight": codes, "weight_s_rel": blocks.view(torch.uint8), "weight_s_channel": rows}
    said = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": ROTATION}
    return tensors | ({} if numbers is None else {"weight_codebook": numbers}), said


def w4a8_plain(weight: torch.Tensor) -> Quantised:
    """The same without a codebook."""
    return w4a8(weight, codebook=False)


_IN_A_BLOCK = re.compile(r"(blocks|layers|refiner)\.\d+\.")
_OF_FOUR_BITS = (nvfp4, nvfp4_awq, w4a4, w4a8, w4a8_plain)
# Name → what quantises a weight, and the columns that it takes together.
FORMATS = {
    "int8": (int8, 1),
    "int8_scalar": (int8_scalar, 1),
    "int8_convrot": (int8_convrot, ROTATION),
    "int8_convrot_64": (int8_convrot_64, 4 * ROTATION),
    "int8_exact": (int8_exact, ROTATION),
    "fp8": (fp8, 1),
    "fp8_e5m2": (fp8_e5m2, 1),
    "mxfp8": (mxfp8, 32),
    "nvfp4": (nvfp4, 16),
    "nvfp4_awq": (nvfp4_awq, 16),
    "w4a4": (w4a4, 64),  # which comfy-kitchen asks for
    "w4a8": (w4a8, 16),
    "w4a8_plain": (w4a8_plain, 16),
}


def write_quantised(
    source: Path,
    path: Path,
    name: str,
    *,
    saying: Saying = "comfy_quant",
    keep: Collection[str] = (),
    others: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Path:
    """Quantise a tiny checkpoint; `keep` names layers left alone, `others` those in other formats.

    `saying`: where the file says how its layers are quantised.
    """
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
        for key in file.keys():  # noqa: SIM118  (not a dict)
            value = file.get_tensor(key)
            layer = key.removesuffix(".weight")
            quantise, group = FORMATS[(others or {}).get(layer, name)]
            outside = quantise in _OF_FOUR_BITS and not _IN_A_BLOCK.search(layer)
            kept = outside or layer in keep or layer == key
            if kept or value.ndim != 2 or value.shape[1] % group:
                tensors[prefix + key] = value
                continue
            found, layers[prefix + layer] = quantise(value)
            tensors |= {f"{prefix}{layer}.{kind}": one for kind, one in found.items()}
    if saying == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    else:
        for layer, said in layers.items():
            text = json.dumps(said).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def as_held(
    tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]
) -> tuple[QuantisedWeight, dict[str, torch.Tensor]]:
    """A weight of one of `FORMATS` as ranks hold it: with its companions, by `formats.py`'s names.

    `tensors`: what a file has of its layer, but for the bias.
    """
    stored = {f"x.{kind}": tensor.contiguous() for kind, tensor in tensors.items()}
    infos = {key: TensorInfo(tuple(t.shape), _NAMES[t.dtype]) for key, t in stored.items()}
    metadata = {"_quantization_metadata": json.dumps({"layers": {"x": said}})}
    weights, _ = find_quantised("file", infos, metadata, stored.__getitem__)
    weight = weights["x.weight"]
    held = {"weight": stored["x.weight"].view(weight.format.storage.dtype)}
    for kind, key in weight.tensors.items():
        held[kind] = companion_values(weight, kind, stored[key])
    return weight, held


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _kitchen() -> Any:
    import comfy_kitchen  # here: it takes seconds

    return comfy_kitchen
