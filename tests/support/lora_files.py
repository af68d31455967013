"""Random patches of a model's weights, and LoRA files of them under ComfyUI's names."""

from collections.abc import Iterable
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
