"""Random patches of a model's weights, and LoRA files of them under ComfyUI's names."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from support import random_numbers
from support.random_numbers import Numbers

RANK = 4


def factors(
    layers: Iterable[tuple[str, tuple[int, int]]],
    *,
    seed: int = 0,
    scale: float = 0.3,
    numbers: Numbers = random_numbers.normal,
) -> dict[str, torch.Tensor]:
    """A LoRA of layers: (path under `diffusion_model.`, (outputs, inputs)) each."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (rows, columns) in layers:
        prefix = f"diffusion_model.{path}"
        tensors[f"{prefix}.lora_up.weight"] = numbers((rows, RANK), generator)
        down = numbers((RANK, columns), generator) * scale / columns**0.5
        tensors[f"{prefix}.lora_down.weight"] = down
        tensors[f"{prefix}.alpha"] = torch.tensor(RANK / 2)
    return tensors


def write_lora(path: Path, layers: Iterable[tuple[str, tuple[int, int]]], *, seed: int = 0) -> Path:
    """A LoRA file in the format that ComfyUI's own nodes save."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(factors(layers, seed=seed), path)
    return path


def widening(layer: str, shape: tuple[int, int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA of one layer that gives it twice the columns of its shape in the model."""
    rows, columns = shape[0], 2 * shape[1]
    shown = {f"diffusion_model.{layer}.reshape_weight": torch.tensor([rows, columns])}
    return factors([(layer, (rows, columns))], seed=seed) | shown


def write_flux_control_lora(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A LoRA file as FLUX.1 Canny's and Depth's are: linears with their biases, and whole norms.

    The input's has twice the columns that it has in the model, whose shapes are given.
    """
    generator = torch.Generator().manual_seed(11)
    tensors = {}
    for layer in (
        *("img_in", "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2"),
        *("single_blocks.0.linear1", "single_blocks.1.linear2", "final_layer.linear"),
    ):
        rows, columns = shapes[f"{layer}.weight"]
        columns *= 1 + (layer == "img_in")
        down = torch.randn(RANK, columns, generator=generator) * 0.3 / columns**0.5
        tensors[f"{layer}.lora_A.weight"] = down
        tensors[f"{layer}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
        tensors[f"{layer}.lora_B.bias"] = torch.randn(rows, generator=generator) * 0.1
    for name, shape in sorted(shapes.items()):
        if name.endswith("_norm.scale"):
            tensors[name] = 1 + torch.randn(shape, generator=generator) * 0.1
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
