"""Writes model files of full size with random weights, to measure without downloading any."""

import json
import math
import struct
from pathlib import Path

import torch

from tp_runtime.models import family_named
from tp_runtime.models.family import Sizes

_BLOCK_ELEMENTS = 32 * 2**20


def sizes_of(name: str, small: bool = False) -> Sizes:
    """The sizes of the published model of a family, or of a small one."""
    return family_named(name).small if small else family_named(name).published


def dummy_file(name: str, folder: Path, small: bool = False) -> Path:
    """The file of ``write_dummy`` in a folder, which is written if it is not there."""
    path = folder / f"dummy_{'small_' * small}{name}.safetensors"
    if not path.exists():
        write_dummy(name, path, small)
    return path


def write_dummy(name: str, path: Path, small: bool = False) -> int:
    """Write a bf16 file of ``sizes_of``'s size; returns its bytes of tensor data.

    The same block of normal numbers, scaled to keep activations of order one, repeats: drawing
    billions of numbers would take longer than the measurement.
    """
    header: dict[str, object] = {}
    offset = 0
    for key, shape in sizes_of(name, small).table.file_tensors.items():
        end = offset + 2 * math.prod(shape)
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(_BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0)) * 0.02
    data = block.bfloat16().view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(data)):
            file.write(data[: offset - start])
    return offset
