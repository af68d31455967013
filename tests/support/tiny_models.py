"""Tiny checkpoints with random weights, in the single-file format that ComfyUI loads.

A tiny model has every tensor of the real one, under the same key and with the same proportions;
only the sizes are small. Weights are scaled so that activations stay near 1 through the model and
its output depends visibly on the latent, the timestep and the caption: an error in any of those
paths shows in a comparison. `native.py` loads these files with ComfyUI's own code.
"""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ZImageSize:
    """Sizes of a Z-Image (NextDiT) model; the defaults keep Z-Image's 30 heads.

    Source: ComfyUI 0.3.75, comfy/ldm/lumina/model.py with `z_image_modulation=True`.
    """

    heads: int = 30
    head_dim: int = 16
    layers: int = 2
    refiner_layers: int = 2
    cap_feat_dim: int = 64
    in_channels: int = 16

    def __post_init__(self) -> None:
        """Raise for sizes that NextDiT itself cannot have."""
        if self.head_dim % 8 or any(axis % 2 for axis in self.axes_dims):
            raise ValueError(f"head_dim must split into even 1/4, 3/8, 3/8: got {self.head_dim}")
        if self.dim < 256:
            raise ValueError(f"heads * head_dim must be at least 256 (modulation): got {self.dim}")

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def ffn_dim(self) -> int:
        """8/3 of the width, rounded up to 256: 10240 for the real 3840."""
        return 256 * math.ceil(int(8 / 3 * self.dim) / 256)

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """RoPE dimensions of (caption position, row, column): 32, 48, 48 for the real 128."""
        return self.head_dim // 4, self.head_dim * 3 // 8, self.head_dim * 3 // 8


def z_image_shapes(size: ZImageSize) -> dict[str, Shape]:
    """Key → shape of every tensor in a Z-Image file of this size, in the file's order."""
    patch_dim = 2 * 2 * size.in_channels
    modulation_dim = 256
    t_hidden_dim = min(size.dim, 1024)
    shapes: dict[str, Shape] = {
        "x_embedder.weight": (size.dim, patch_dim),
        "x_embedder.bias": (size.dim,),
        "t_embedder.mlp.0.weight": (t_hidden_dim, 256),
        "t_embedder.mlp.0.bias": (t_hidden_dim,),
        "t_embedder.mlp.2.weight": (modulation_dim, t_hidden_dim),
        "t_embedder.mlp.2.bias": (modulation_dim,),
        "cap_embedder.0.weight": (size.cap_feat_dim,),
        "cap_embedder.1.weight": (size.dim, size.cap_feat_dim),
        "cap_embedder.1.bias": (size.dim,),
        "x_pad_token": (1, size.dim),
        "cap_pad_token": (1, size.dim),
        "norm_final.weight": (size.dim,),  # in the file, used by nobody
        "final_layer.linear.weight": (patch_dim, size.dim),
        "final_layer.linear.bias": (patch_dim,),
        "final_layer.adaLN_modulation.1.weight": (size.dim, modulation_dim),
        "final_layer.adaLN_modulation.1.bias": (size.dim,),
    }
    for index in range(size.refiner_layers):
        shapes.update(_z_image_block(f"context_refiner.{index}", size, modulation_dim=None))
        shapes.update(_z_image_block(f"noise_refiner.{index}", size, modulation_dim))
    for index in range(size.layers):
        shapes.update(_z_image_block(f"layers.{index}", size, modulation_dim))
    return shapes


def _z_image_block(
    name: str, size: ZImageSize, modulation_dim: int | None
) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.attention.qkv.weight", (3 * size.dim, size.dim)
    yield f"{name}.attention.out.weight", (size.dim, size.dim)
    yield f"{name}.attention.q_norm.weight", (size.head_dim,)
    yield f"{name}.attention.k_norm.weight", (size.head_dim,)
    yield f"{name}.feed_forward.w1.weight", (size.ffn_dim, size.dim)
    yield f"{name}.feed_forward.w2.weight", (size.dim, size.ffn_dim)
    yield f"{name}.feed_forward.w3.weight", (size.ffn_dim, size.dim)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        yield f"{name}.{norm}.weight", (size.dim,)
    if modulation_dim is not None:
        yield f"{name}.adaLN_modulation.0.weight", (4 * size.dim, modulation_dim)
        yield f"{name}.adaLN_modulation.0.bias", (4 * size.dim,)


@dataclass(frozen=True)
class FluxSize:
    """Sizes of a FLUX.1 model; the defaults keep its 24 heads, MLP ratio and 16 channels.

    `in_channels` is 16 for dev, schnell and Kontext, 32 for Canny and Depth, 96 for Fill.
    Source: ComfyUI 0.3.75, comfy/ldm/flux/model.py.
    """

    heads: int = 24
    head_dim: int = 16
    double_blocks: int = 2
    single_blocks: int = 2
    context_dim: int = 64
    vector_dim: int = 48
    in_channels: int = 16
    guidance: bool = True
    norm_name: str = "scale"

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


def flux_shapes(size: FluxSize) -> dict[str, Shape]:
    """Key → shape of every tensor in a FLUX.1 file of this size."""
    dim = size.dim
    linears: dict[str, tuple[int, int]] = {
        "img_in": (dim, 4 * size.in_channels),
        "time_in.in_layer": (dim, 256),
        "time_in.out_layer": (dim, dim),
        "vector_in.in_layer": (dim, size.vector_dim),
        "vector_in.out_layer": (dim, dim),
        "txt_in": (dim, size.context_dim),
        "final_layer.linear": (4 * 16, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    if size.guidance:
        linears |= {"guidance_in.in_layer": (dim, 256), "guidance_in.out_layer": (dim, dim)}
    norms = []
    for index in range(size.double_blocks):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linears[f"{block}_mod.lin"] = (6 * dim, dim)
            linears[f"{block}_attn.qkv"] = (3 * dim, dim)
            linears[f"{block}_attn.proj"] = (dim, dim)
            linears[f"{block}_mlp.0"] = (4 * dim, dim)
            linears[f"{block}_mlp.2"] = (dim, 4 * dim)
            norms.append(f"{block}_attn.norm")
    for index in range(size.single_blocks):
        block = f"single_blocks.{index}"
        linears[f"{block}.modulation.lin"] = (3 * dim, dim)
        linears[f"{block}.linear1"] = (7 * dim, dim)
        linears[f"{block}.linear2"] = (dim, 5 * dim)
        norms.append(f"{block}.norm")
    shapes = _with_biases(linears)
    for norm in norms:
        shapes[f"{norm}.query_norm.{size.norm_name}"] = (size.head_dim,)
        shapes[f"{norm}.key_norm.{size.norm_name}"] = (size.head_dim,)
    return shapes


@dataclass(frozen=True)
class QwenImageSize:
    """Sizes of a Qwen-Image model; the defaults keep its 24 heads, MLP ratio and 16 channels.

    Source: ComfyUI 0.3.75, comfy/ldm/qwen_image/model.py.
    """

    heads: int = 24
    head_dim: int = 16
    layers: int = 3
    context_dim: int = 64

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


def qwen_image_shapes(size: QwenImageSize) -> dict[str, Shape]:
    """Key → shape of every tensor in a Qwen-Image file of this size."""
    dim = size.dim
    linears: dict[str, tuple[int, int]] = {
        "img_in": (dim, 64),
        "txt_in": (dim, size.context_dim),
        "time_text_embed.timestep_embedder.linear_1": (dim, 256),
        "time_text_embed.timestep_embedder.linear_2": (dim, dim),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (64, dim),
    }
    norms: dict[str, Shape] = {"txt_norm.weight": (size.context_dim,)}
    for index in range(size.layers):
        block = f"transformer_blocks.{index}"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linears[f"{block}.attn.{name}"] = (dim, dim)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            linears[f"{block}.attn.{name}"] = (dim, dim)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norms[f"{block}.attn.{name}.weight"] = (size.head_dim,)
        for stream in ("img", "txt"):
            linears[f"{block}.{stream}_mod.1"] = (6 * dim, dim)
            linears[f"{block}.{stream}_mlp.net.0.proj"] = (4 * dim, dim)
            linears[f"{block}.{stream}_mlp.net.2"] = (dim, 4 * dim)
    return _with_biases(linears) | norms


def _with_biases(linears: dict[str, tuple[int, int]]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def write_z_image(path: Path, size: ZImageSize | None = None, **options: Any) -> Path:
    """Write a tiny Z-Image checkpoint to `path` and return the path; `options` as `write` has."""
    return write(path, z_image_shapes(size or ZImageSize()), **options)


def write_flux(path: Path, size: FluxSize | None = None, **options: Any) -> Path:
    """Write a tiny FLUX.1 checkpoint to `path` and return the path; `options` as `write` has."""
    return write(path, flux_shapes(size or FluxSize()), **options)


def write_qwen_image(path: Path, size: QwenImageSize | None = None, **options: Any) -> Path:
    """Write a tiny Qwen-Image checkpoint to `path` and return the path; `options` as `write`."""
    return write(path, qwen_image_shapes(size or QwenImageSize()), **options)


def write(
    path: Path,
    shapes: dict[str, Shape],
    *,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
    seed: int = 0,
) -> Path:
    """Write random tensors of these shapes.

    The values depend on `seed` and `shapes` only: another dtype rounds the same weights, another
    prefix (ComfyUI itself also reads files with `model.diffusion_model.`) renames them.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        prefix + key: _random_tensor(key, shape, generator).to(dtype)
        for key, shape in shapes.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
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
    metadata = {"format": "pt"}
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


def _random_tensor(key: str, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator)
    if key.endswith("pad_token"):
        return values
    if key.endswith(".bias"):
        return 0.2 * values
    if len(shape) == 1:  # norms
        return 1 + 0.2 * values
    # The sinusoid and SiLU each halve it.
    time = ("t_embedder.", "time_in.", "guidance_in.", "vector_in.", "time_text_embed.")
    gain = 2.0 if key.startswith(time) else 1.0
    return values * gain / math.sqrt(shape[-1])
