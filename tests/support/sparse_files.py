"""Files for tests that look at headers and formats: small ones, and large ones in no time."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from support.tiny_models import tiny

NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.int64: "I64",
    torch.uint8: "U8",
}


def one_block(family: str) -> dict[str, int]:
    """The tiny model's sizes, as `write_tiny` takes them, but for one block of each kind."""
    names = [field.name for field in dataclasses.fields(tiny(family))]
    return {name: 1 for name in names if name.startswith("num_") and name != "num_heads"}


def holes(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Tensors without values."""
    return {name: torch.empty(s, dtype=dtype, device="meta") for name, s in shapes.items()}


def write_sparse(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a file of these tensors; those without values are holes, which take no disk."""
    header: dict[str, Any] = {}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        entry = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        base = file.tell()
        for name, tensor in tensors.items():
            if tensor.device.type != "meta" and tensor.nbytes:
                file.seek(base + header[name]["data_offsets"][0])
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        file.truncate(base + stop)
    return path
