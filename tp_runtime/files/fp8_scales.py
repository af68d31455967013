"""Which weights of a model file are stored in fp8 with a scale, in each of ComfyUI's formats.

Both halves. A *plain* fp8 file has no scales and needs nothing of this. The others:

- *scaled*: a marker tensor ``scaled_fp8``; ``X.scale_weight`` beside ``X.weight``.
- *mixed*: the file's metadata ``_quantization_metadata`` names the layers and their formats, or
  each has a tensor ``X.comfy_quant`` (JSON as bytes) that does; ``X.weight_scale``.

The weight's value is what is stored times the scale, a single number. Scales of the layer's input
serve GPUs that multiply in fp8; ours multiply in the compute dtype and have no use for them.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CheckpointError
from .safetensors_file import TensorInfo

_MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
_SCALED = ("scale_weight", "scale_input")
_MIXED = ("weight_scale", "input_scale", "comfy_quant")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_MAX_DESCRIPTION = 2**16  # bytes


def find_scales(
    path: str,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    read: Callable[[str], torch.Tensor],
) -> tuple[dict[str, str], set[str]]:
    """The names of quantised weights, each with its scale's; and of all tensors that serve for it.

    ``tensors`` and ``metadata`` are the whole header's; ``read`` reads a tensor.

    Raises:
        CheckpointError: a format that is not known, or a scale that is missing or misshaped.
    """
    if _MARKER in tensors:
        layers = [n.removesuffix(".scale_weight") for n in tensors if n.endswith(".scale_weight")]
        scales = {f"{layer}.weight": f"{layer}.scale_weight" for layer in layers}
        extra = {_MARKER} | {f"{layer}.{kind}" for layer in layers for kind in _SCALED}
    else:
        formats = _formats(path, tensors, metadata, read)
        for layer, name in formats.items():
            if name not in _FORMATS:
                raise _unsupported(path, f"layer {layer} has the format {name!r}")
        scales = {f"{layer}.weight": f"{layer}.weight_scale" for layer in formats}
        extra = {f"{layer}.{kind}" for layer in formats for kind in _MIXED}
    for weight, scale in scales.items():
        if weight not in tensors or scale not in tensors:
            raise CheckpointError(
                f"The model file {path} lacks {weight} or its scale {scale}. Download it again."
            )
        if tensors[scale].num_elements != 1:
            raise _unsupported(path, f"{scale} has the shape {list(tensors[scale].shape)}")
    return scales, extra & tensors.keys()


def _formats(
    path: str,
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    read: Callable[[str], torch.Tensor],
) -> dict[str, str]:
    """Layer → format, of the layers that the diffusion model has."""
    described: dict[str, Any] = {}
    try:
        if METADATA in metadata:
            described |= json.loads(metadata[METADATA])["layers"]
        for name, tensor in tensors.items():
            if name.endswith(".comfy_quant"):
                if tensor.dtype != "U8" or tensor.num_elements > _MAX_DESCRIPTION:
                    raise ValueError(f"{name} has {tensor.num_elements} {tensor.dtype}")
                text = read(name).numpy().tobytes()
                described[name.removesuffix(".comfy_quant")] = json.loads(text)
        names = {layer: _without_prefix(layer) for layer in described}
        # A full checkpoint's metadata also describes its text encoders.
        return {
            names[layer]: str(description["format"])
            for layer, description in described.items()
            if f"{names[layer]}.weight" in tensors
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"The model file {path} does not say in a readable way how it is quantised "
            f"({type(error).__name__}: {error}). Download it again."
        ) from error


def _without_prefix(name: str) -> str:
    return name.removeprefix("model.").removeprefix("diffusion_model.")


def _unsupported(path: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"The model file {path} is quantised in a way that cannot be split yet: {what}. "
        f"Supported: {', '.join(_FORMATS)} with one scale per layer. Choose a bf16 or fp8 file, or "
        "load it with the stock 'Load Diffusion Model' node."
    )
