"""Tiny GGUF files, made from tiny ComfyUI files as the converters for ComfyUI make them.

`dequantised` writes what the reference is loaded from: the same file's values, taken out of their
blocks by the `gguf` package alone.
"""

import math
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file, save_file

# The types in which the package can write values; for others `quantise` makes up blocks.
WRITTEN = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Type → where its blocks keep the fp16 scale, and that of the minimum if they have one.
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
ARCHITECTURES = {
    "z_image": "lumina2",
    "flux": "flux",
    "flux2": "flux",
    "qwen_image": "qwen_image",
    "krea2": "krea2",
    "qwen_image_21": "qwen_image21",
    "wan": "wan",
}
KEPT_ELEMENTS = 1024  # converters leave small tensors alone


def write_gguf(
    source: Path,
    path: Path,
    kind: str,
    *,
    architecture: str = "flux",
    prefix: str = "",
    flat: bool = False,
) -> Path:
    """Write the weights of a tiny ComfyUI file in blocks of this type, everything else as F32.

    A weight whose rows the blocks do not fit is reshaped to rows of one block, and its shape noted,
    if its size allows; else, and with five axes, it becomes F16. `flat`: what begins with axes of
    length one is without them, as ggml writes it.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in load_file(source).items():
        values, stored = tensor.float().numpy(), prefix + name
        qtype = GGMLQuantizationType[kind]
        begins_with_one = values.shape[0] == 1
        if values.ndim < 2 or values.size <= KEPT_ELEMENTS or begins_with_one:
            qtype = GGMLQuantizationType.F32
        elif values.ndim > 4:
            qtype = GGMLQuantizationType.F16
        block_size = GGML_QUANT_SIZES[qtype][0]
        if values.shape[-1] % block_size:
            if values.size % block_size:
                qtype = GGMLQuantizationType.F16
            else:
                writer.add_array(f"comfy.gguf.orig_shape.{stored}", list(values.shape))
                values = values.reshape(-1, block_size)
        while flat and values.ndim > 1 and values.shape[0] == 1:
            values = values[0]
        writer.add_tensor(stored, quantise(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantise(values: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    """The values in blocks; of a K type, which the package cannot write, random blocks.

    Those have the mean and the spread of weights: 0 and one over the root of the width.
    """
    if qtype.name not in K_TYPES:
        return gguf.quantize(values, qtype)
    block_size, block_bytes = GGML_QUANT_SIZES[qtype]
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.size // block_size, block_bytes), np.uint8)
    places = _SCALES[qtype.name]

    def with_scales(*scales: float) -> np.ndarray:
        for place, scale in zip(places, scales, strict=True):
            blocks[:, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
        return gguf.dequantize(blocks, qtype)

    if len(places) == 1:
        scales = (1 / math.sqrt(values.shape[-1]) / with_scales(1.0).std(),)
    else:
        ratio = -with_scales(1.0, 0.0).mean() / with_scales(0.0, 1.0).mean()
        scale = 1 / math.sqrt(values.shape[-1]) / with_scales(1.0, ratio).std()
        scales = (scale, ratio * scale)
    with_scales(*scales)
    return blocks.reshape(len(values), -1)


def dequantised(path: Path, source: Path, target: Path, prefix: str = "") -> Path:
    """Write the GGUF file's values as a safetensors file, in the shapes of the file it was made of.

    They are in fp32: loading them in another dtype rounds what the blocks hold, once.
    """
    found = {}
    shapes = {name: tensor.shape for name, tensor in load_file(source).items()}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        name = tensor.name.removeprefix(prefix)
        found[name] = torch.from_numpy(values.copy()).reshape(shapes[name])
    save_file(found, target)
    return target
