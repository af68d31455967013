"""Writes model files of full size with random weights, to measure without downloading any."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from tp_runtime.files.safetensors_file import TensorInfo
from tp_runtime.models import family

# Real sizes: what `infer_config` reads from the published files.
_FULL_SIZE = {
    "z_image": {
        "x_embedder.weight": (3840, 64),
        "cap_embedder.1.weight": (3840, 2560),
        "t_embedder.mlp.0.weight": (1024, 256),
        "layers.0.attention.q_norm.weight": (128,),
        "layers.0.feed_forward.w1.weight": (10240, 3840),
        "cap_pad_token": (1, 3840),
        **{f"layers.{i}.x": () for i in range(30)},
        **{f"noise_refiner.{i}.x": () for i in range(2)},
    },
    "flux": {
        "img_in.weight": (3072, 64),
        "txt_in.weight": (3072, 4096),
        "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.in_layer.weight": (3072, 256),
        "final_layer.linear.weight": (64, 3072),
        "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        **{f"double_blocks.{i}.x": () for i in range(19)},
        **{f"single_blocks.{i}.x": () for i in range(38)},
    },
    "qwen_image": {
        "img_in.weight": (3072, 64),
        "txt_norm.weight": (3584,),
        "proj_out.weight": (64, 3072),
        "transformer_blocks.0.attn.norm_q.weight": (128,),
        **{f"transformer_blocks.{i}.x": () for i in range(60)},
    },
}

# The same, small: a few heads and blocks of real width.
_SMALL_SIZE = {
    "z_image": {
        "x_embedder.weight": (512, 64),
        "cap_embedder.1.weight": (512, 2560),
        "t_embedder.mlp.0.weight": (256, 256),
        "layers.0.attention.q_norm.weight": (128,),
        "layers.0.feed_forward.w1.weight": (1024, 512),
        "cap_pad_token": (1, 512),
        "layers.1.x": (),
        "noise_refiner.0.x": (),
    },
    "flux": {
        "img_in.weight": (512, 64),
        "txt_in.weight": (512, 4096),
        "vector_in.in_layer.weight": (512, 768),
        "guidance_in.in_layer.weight": (512, 256),
        "final_layer.linear.weight": (64, 512),
        "double_blocks.0.img_attn.norm.query_norm.scale": (128,),
        "double_blocks.1.x": (),
        "single_blocks.0.x": (),
    },
    "qwen_image": {
        "img_in.weight": (512, 64),
        "txt_norm.weight": (3584,),
        "proj_out.weight": (64, 512),
        "transformer_blocks.0.attn.norm_q.weight": (128,),
        "transformer_blocks.1.x": (),
    },
}

_BLOCK_ELEMENTS = 32 * 2**20


def config_of(name: str, small: bool = False) -> dict[str, Any]:
    """The configuration of the published model of a family, or of a small one."""
    sizes = (_SMALL_SIZE if small else _FULL_SIZE)[name]
    tensors = {key: TensorInfo(shape, "BF16") for key, shape in sizes.items()}
    config: dict[str, Any] = family(name).infer_config(tensors)
    return config


def dummy_file(name: str, folder: Path, small: bool = False) -> Path:
    """The file of ``write_dummy`` in a folder, which is written if it is not there."""
    path = folder / f"dummy_{'small_' * small}{name}.safetensors"
    if not path.exists():
        write_dummy(name, path, small)
    return path


def write_dummy(name: str, path: Path, small: bool = False) -> int:
    """Write a bf16 file of ``config_of``'s size; returns its bytes of tensor data.

    The same block of normal numbers, scaled to keep activations of order one, repeats: drawing
    billions of numbers would take longer than the measurement.
    """
    header: dict[str, object] = {}
    offset = 0
    for key, shape in family(name).file_tensors(config_of(name, small)).items():
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
