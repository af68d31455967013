"""Writes model files of full size with random weights, to measure without downloading any."""

import functools
import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tp_runtime.models import family_named
from tp_runtime.models.family import Sizes

_RING_ELEMENTS = 32 * 2**20
# One that no inputs are drawn with. Where captions and weights were the same numbers, rounding grew
# from block to block: results of LTX-2 in bf16 were 0.37 from those in fp32.
_RING_SEED = 2**32 - 1
_INT8_STEPS = 32  # in a standard deviation
_ROTATION = 256
# Norms of queries and keys. With one, attention looks at a thousand tokens nearly alike, and what
# is wrong with them hardly shows; with this, at a few dozen.
_QK_NORM = re.compile(r"(norm_(added_)?[qk]|[qk]_?norm|(query|key)_norm)\.(weight|scale)$")
_QK_NORM_SCALE = 1.5
# What files have less one: norms and modulations of Krea 2.
FROM_ONE = (
    *("prenorm.scale", "postnorm.scale", "qnorm.scale", "knorm.scale", "txtmlp.0.scale"),
    *("last.norm.scale", "mod.lin", "modulation.lin"),
)
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
# Name, dtype, shape; mean and standard deviation of the numbers.
Entry = tuple[str, str, tuple[int, ...], float, float]


def sizes_of(name: str, small: bool = False) -> Sizes:
    """The sizes of the published model of a family, or of a small one."""
    return family_named(name).small if small else family_named(name).published


def dummy_file(name: str, folder: Path, small: bool = False, weights: str = "bf16") -> Path:
    """The file of ``write_dummy`` in a folder, which is written if it is not there."""
    kind = "" if weights == "bf16" else f"_{weights}"
    path = folder / f"random_{'small_' * small}{name}{kind}.safetensors"
    if not path.exists():
        write_dummy(name, path, small, weights)
    return path


def write_dummy(name: str, path: Path, small: bool = False, weights: str = "bf16") -> None:
    """Write a file of ``sizes_of``'s size. ``weights``: one of ``WEIGHTS``.

    All tensors have their numbers from the same ring of normal ones, each from a place of its own:
    drawing billions of them would take longer than the measurement, and were all tensors of a shape
    equal, as they would be from one place, then whatever takes one for another would be right, and
    rounding would add up along the equal blocks. (Rotated by ConvRot, normal numbers are as
    normal.) Activations stay of order one, and every block changes the result visibly: what is
    wrong in one shows.
    """
    sizes = sizes_of(name, small)
    metadata = {"format": "pt"}
    if sizes.told():  # ComfyUI takes all that a file tells, or nothing
        metadata = {"config": json.dumps({"transformer": sizes.for_comfyui()})}
    _write(path, sizes.table.file_tensors, metadata, weights)


def write_tensors(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write a file of tensors in bf16, of such numbers."""
    _write(path, shapes, {"format": "pt"})


def _write(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    metadata: Mapping[str, str],
    weights: str = "bf16",
) -> None:
    entries = [one for key, shape in shapes.items() for one in _entries(key, tuple(shape), weights)]
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for key, dtype, shape, *_ in entries:
        start, end = end, end + _BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = functools.cache(_numbers)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, dtype, shape, mean, deviation in entries:
            if dtype == "U8":
                file.write(_said(weights))
                continue
            ring, left = drawn(dtype, mean, deviation), _BYTES[dtype] * math.prod(shape)
            place = zlib.crc32(key.encode()) * _BYTES[dtype] % len(ring)
            while left:
                left -= file.write(ring[place : place + left])
                place = 0


@functools.cache
def _ring() -> torch.Tensor:
    return torch.randn(_RING_ELEMENTS, generator=torch.Generator().manual_seed(_RING_SEED))


def _numbers(dtype: str, mean: float, deviation: float) -> memoryview:
    """The bytes of the ring that tensors have theirs from."""
    if dtype == "F32":
        found = torch.full((2**16,), mean)
    elif dtype == "I8":
        found = (_INT8_STEPS * _ring()).round().clamp(-127, 127).to(torch.int8)
    elif dtype == "F8_E4M3":
        found = _ring().to(torch.float8_e4m3fn)
    else:
        found = (mean + deviation * _ring()).bfloat16()
    return found.view(torch.uint8).numpy().data


def _said(weights: str) -> bytes:
    """What a quantised layer says of itself."""
    return json.dumps(_FORMATS[weights]).encode()


def _entries(key: str, shape: tuple[int, ...], weights: str) -> Iterator[Entry]:
    """A tensor as the file has it: the weight of a linear in a block with what it is quantised by.

    Others stay in bf16, as in the published files.
    """
    inputs = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
    deviation = max(inputs, 1) ** -0.5
    linear = _IN_A_BLOCK.search(key) and len(shape) == 2 and shape[1] % _ROTATION == 0
    if weights == "bf16" or not linear:
        yield key, "BF16", shape, _mean(key, shape), deviation
        return
    layer = key.removesuffix("weight")
    scale = deviation / (1 if weights == "fp8" else _INT8_STEPS)
    yield key, "F8_E4M3" if weights == "fp8" else "I8", shape, 0.0, 1.0
    yield f"{layer}weight_scale", "F32", () if weights == "fp8" else shape[:1], scale, 0.0
    yield f"{layer}comfy_quant", "U8", (len(_said(weights)),), 0.0, 0.0


def _mean(key: str, shape: tuple[int, ...]) -> float:
    """Around which numbers lie: nothing, or of norms how they scale."""
    if len(shape) > 1 or key.endswith((".bias", "mod.lin", "modulation.lin")):
        return 0.0
    scale = _QK_NORM_SCALE if _QK_NORM.search(key) else 1.0
    return scale - key.endswith(FROM_ONE)
