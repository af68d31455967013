"""Tiny checkpoints with random weights, in the single-file format that ComfyUI loads.

A tiny model has every tensor of the real one, under the same key and with the same proportions;
only the sizes are small. Weights are scaled so that activations stay near 1 through the model and
its output depends visibly on the latent, the timestep and the caption: an error in any of those
paths shows in a comparison. `native.py` loads these files with ComfyUI's own code.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.dummy import FROM_ONE
from support import random_numbers
from support.random_numbers import Numbers
from tp_runtime.models import families

Shape = tuple[int, ...]


def tiny(family: str, **changes: Any) -> Any:
    """The sizes of a family's tiny model, with other values of some fields."""
    return dataclasses.replace(families()[family].small, **changes)  # type: ignore[type-var]


def tiny_shapes(family: str, **changes: Any) -> dict[str, Shape]:
    """Key → shape of every tensor in the file of a family's tiny model.

    By the pack's own table: that it is right is shown by ComfyUI's classes, which load the files.
    """
    table = tiny(family, **changes).table
    return table.file_tensors | dict(table.unused)


def write_tiny(family: str, path: Path, **changes_and_options: Any) -> Path:
    """Write a tiny checkpoint to `path` and return the path.

    Keyword arguments: of `tiny` and of `write`.
    """
    fields = {field.name for field in dataclasses.fields(tiny(family))}
    changes = {name: value for name, value in changes_and_options.items() if name in fields}
    options = {name: value for name, value in changes_and_options.items() if name not in fields}
    sizes = tiny(family, **changes)
    told = sizes.for_comfyui() if sizes.told() else None
    return write(path, tiny_shapes(family, **changes), told=told, **options)


def write(
    path: Path,
    shapes: dict[str, Shape],
    *,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    seed: int = 0,
    numbers: Numbers = random_numbers.normal,
    told: Mapping[str, Any] | None = None,
) -> Path:
    """Write random tensors of these shapes. `told`: settings for the file's metadata.

    The values depend on `seed` and `shapes` only, not on the order of the keys: another dtype
    rounds the same weights, another prefix (ComfyUI itself also reads files with
    `model.diffusion_model.`) renames them.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        prefix + key: _random_tensor(key, shape, numbers, generator).to(dtype)
        for key, shape in sorted(shapes.items())
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {"config": json.dumps({"transformer": dict(told)})} if told else {}
    save_file(tensors, path, metadata={"format": "pt"} | config)
    return path


Fp8Layout = Literal["plain", "scaled", "mixed", "comfy_quant"]


def write_fp8(
    source: Path,
    path: Path,
    layout: Fp8Layout,
    dtype: torch.dtype = torch.float8_e4m3fn,
    keep: Collection[str] = (),
) -> Path:
    """Quantise a tiny checkpoint as the published fp8 files are; `keep` names layers left alone.

    `plain`: every tensor cast. `scaled`: ComfyUI's first format with scales. `mixed`: scales, and
    the layers in the file's metadata; `comfy_quant`: the same beside each layer. With scales, only
    weights of linears are in fp8, and what is not is rounded to fp8: ComfyUI 0.3.75 would round it.
    """
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    format_name = str(dtype).removeprefix("torch.")
    limit = torch.finfo(dtype).max
    scale_name = "scale_weight" if layout == "scaled" else "weight_scale"
    with safe_open(source, framework="pt") as file:
        metadata = dict(file.metadata())
        for key in file.keys():  # noqa: SIM118  (not a dict)
            value = file.get_tensor(key)
            layer = key.removesuffix(".weight")
            if layout == "plain":
                tensors[key] = value.to(dtype)
            elif value.ndim != 2 or layer == key or layer in keep:
                tensors[key] = value.to(dtype).to(value.dtype)
            else:
                scale = (value.abs().max() / limit).float()
                tensors[key] = (value / scale).to(dtype)
                tensors[f"{layer}.{scale_name}"] = scale
                layers[layer] = {"format": format_name}
    if layout == "scaled":
        tensors["scaled_fp8"] = torch.zeros(2).to(dtype)
    elif layout == "mixed":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    elif layout == "comfy_quant":
        for layer, description in layers.items():
            text = json.dumps(description).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    save_file(tensors, path, metadata=metadata)
    return path


def _random_tensor(
    key: str, shape: Shape, numbers: Numbers, generator: torch.Generator
) -> torch.Tensor:
    values = numbers(shape, generator)
    if key.endswith(".kernel"):  # of Wan Animate: what pictures are blurred with
        line = torch.tensor((1.0, 3.0, 3.0, 1.0)) / 8
        return torch.outer(line, line)
    if key.endswith("pad_token"):
        return values
    if key.startswith("motion_encoder.") and not key.endswith(".bias"):
        return 1.8 * values  # of Wan Animate: scaled by its layers, which also blur what is random
    if key.endswith(".bias"):
        return 0.2 * values
    if key.endswith(FROM_ONE):
        return 0.2 * values
    if len(shape) == 1:  # norms, and markers, which are empty
        return 1 + 0.2 * values
    # The sinusoid and SiLU each halve it.
    time = (
        *("t_embedder.", "time_in.", "guidance_in.", "vector_in.", "time_text_embed."),
        *("time_embedding.", "time_projection."),
        *("tmlp.", "tproj."),
    )
    gain = 2.0 if key.startswith(time) or "adaln_single." in key else 1.0
    return values * gain / math.sqrt(shape[-1])
