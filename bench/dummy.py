"""Writes model files of full size with random weights, to measure without downloading any."""

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tp_runtime.models import family_named
from tp_runtime.models.family import Sizes

_BLOCK_ELEMENTS = 32 * 2**20
_DEVIATION = 0.02  # of weights: keeps activations of order one
_INT8_STEPS = 32  # in it
_ROTATION = 256
_IN_A_BLOCK = re.compile(r"\.\d+\..*\.weight$")
# How the linears of blocks may be stored, as ComfyUI's files say it.
_FORMATS: dict[str, dict[str, object]] = {
    "fp8": {"format": "float8_e4m3fn"},
    "int8_convrot": {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": _ROTATION,
    },
}
WEIGHTS = ("bf16", *_FORMATS)
_BYTES = {"BF16": 2, "F8_E4M3": 1, "I8": 1, "F32": 4, "U8": 1}
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def sizes_of(name: str, small: bool = False) -> Sizes:
    """The sizes of the published model of a family, or of a small one."""
    return family_named(name).small if small else family_named(name).published


def dummy_file(name: str, folder: Path, small: bool = False, weights: str = "bf16") -> Path:
    """The file of ``write_dummy`` in a folder, which is written if it is not there."""
    kind = "" if weights == "bf16" else f"_{weights}"
    path = folder / f"dummy_{'small_' * small}{name}{kind}.safetensors"
    if not path.exists():
        write_dummy(name, path, small, weights)
    return path


def write_dummy(name: str, path: Path, small: bool = False, weights: str = "bf16") -> None:
    """Write a file of ``sizes_of``'s size. ``weights``: one of ``WEIGHTS``.

    The same block of normal numbers repeats: drawing billions of them would take longer than the
    measurement. (Rotated by ConvRot, normal numbers are as normal.)
    """
    sizes = sizes_of(name, small)
    said = json.dumps(_FORMATS.get(weights)).encode()
    entries = [
        entry
        for key, shape in sizes.table.file_tensors.items()
        for entry in _entries(key, shape, weights, len(said))
    ]
    told = sizes.told()
    metadata = {"config": json.dumps({"transformer": told})} if told else {"format": "pt"}
    block = torch.randn(_BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0))
    scale = _DEVIATION / _INT8_STEPS if weights == "int8_convrot" else _DEVIATION
    numbers = {
        "BF16": (_DEVIATION * block).bfloat16(),
        "F8_E4M3": block.to(torch.float8_e4m3fn),
        "I8": (_INT8_STEPS * block).round().clamp(-127, 127).to(torch.int8),
        "F32": torch.full((2**16,), scale),
    }
    data = {dtype: one.view(torch.uint8).numpy().tobytes() for dtype, one in numbers.items()}
    data["U8"] = said
    _write(path, entries, metadata, data)


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a file of tensors in bf16, of such normal numbers."""
    block = torch.randn(_BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0))
    data = (_DEVIATION * block).bfloat16().view(torch.uint8).numpy().tobytes()
    entries = [(key, "BF16", tuple(shape)) for key, shape in shapes.items()]
    _write(path, entries, {"format": "pt"}, {"BF16": data})


def _write(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], data: Mapping[str, bytes]
) -> None:
    """``data``: what tensors of each dtype repeat."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for key, dtype, shape in entries:
        start, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dtype, shape in entries:
            whole, rest = divmod(_BYTES[dtype] * math.prod(shape), len(data[dtype]))
            for _ in range(whole):
                file.write(data[dtype])
            file.write(data[dtype][:rest])


def _entries(key: str, shape: tuple[int, ...], weights: str, said_bytes: int) -> Iterator[Entry]:
    """A tensor as the file has it: the weight of a linear in a block with what it is quantised by.

    Others stay in bf16, as in the published files.
    """
    linear = _IN_A_BLOCK.search(key) and len(shape) == 2 and shape[1] % _ROTATION == 0
    if weights == "bf16" or not linear:
        yield key, "BF16", shape
        return
    layer = key.removesuffix("weight")
    yield key, "F8_E4M3" if weights == "fp8" else "I8", shape
    yield f"{layer}weight_scale", "F32", () if weights == "fp8" else shape[:1]
    yield f"{layer}comfy_quant", "U8", (said_bytes,)
