"""ControlNets of the published sizes, with random weights, and how a prompt applies them.

Fun Union 2.1 for Z-Image (ComfyUI 0.33), and InstantX's for Qwen-Image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.dummy import sizes_of, write_tensors
from bench.prompts import Prompt, node
from tp_runtime.models.z_image.model_patch import UnionControl

UNION_LAYERS, UNION_CHANNELS = 15, 33  # of Fun Union 2.1
INSTANTX_BLOCKS = 5
STRENGTH = 0.8
# The folder of ComfyUI's models that they lie in.
FOLDERS = {"z_image": "model_patches", "qwen_image": "controlnet"}
# ComfyUI looks for no sizes in their files.
PUBLISHED_ONLY = ("z_image",)


def control_file(model: str, folder: Path, small: bool = False) -> Path:
    """The file of Fun Union for Z-Image, of InstantX for Qwen-Image; written if it is not there."""
    path = folder / f"random_{'small_' * small}control_of_{model}.safetensors"
    if not path.exists():
        write_tensors(path, _shapes(model, small))
    return path


def _shapes(model: str, small: bool) -> Mapping[str, Sequence[int]]:
    sizes: Any = sizes_of(model, small)
    if model == "z_image":
        of_model = sizes.num_heads, sizes.head_dim, sizes.ffn_dim
        return UnionControl(*of_model, UNION_LAYERS, UNION_CHANNELS, True).table.file_tensors
    blocks = min(INSTANTX_BLOCKS, sizes.num_blocks)
    of_blocks = replace(sizes, num_blocks=blocks).table.file_tensors
    found = {
        name: shape
        for name, shape in of_blocks.items()
        if not name.startswith(("norm_out.", "proj_out."))
    }
    linears = {f"controlnet_blocks.{index}": sizes.dim for index in range(blocks)}
    for name, inputs in {**linears, "controlnet_x_embedder": 64}.items():
        found |= {f"{name}.weight": (sizes.dim, inputs), f"{name}.bias": (sizes.dim,)}
    return found


def with_control(model: str, prompt: Prompt, file: str, size: Mapping[str, int]) -> Prompt:
    """The prompt with a ControlNet that looks at a picture of that ``width`` and ``height``."""
    given = {"vae": ["vae", 0], "image": ["picture", 0], "strength": STRENGTH}
    found = prompt | {
        "picture": node("BenchPicture", **size),
        "vae": node("BenchVAE", video=model == "qwen_image"),
    }
    if model == "z_image":
        found["control"] = node("ModelPatchLoader", name=file)
        links = {"model": ["model", 0], "model_patch": ["control", 0]}
        found["controlled"] = node("ZImageFunControlnet", **links, **given)
        replaced = {"model": ["controlled", 0]}
    else:
        found["control"] = node("ControlNetLoader", control_net_name=file)
        links = {name: [name, 0] for name in ("positive", "negative")}
        links["control_net"] = ["control", 0]
        percents = {"start_percent": 0.0, "end_percent": 1.0}
        found["controlled"] = node("ControlNetApplyAdvanced", **links, **given, **percents)
        replaced = {"positive": ["controlled", 0], "negative": ["controlled", 1]}
    inputs = prompt["sampler"]["inputs"] | replaced
    return found | {"sampler": node("KSampler", **inputs)}
