"""Tiny full checkpoints: a diffusion model, a text encoder and a VAE in one file.

With `support.comfy_pack`, ComfyUI's own Load Checkpoint reads them.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.native import import_comfy
from support.tiny_models import tiny

MODEL_PREFIX = "model.diffusion_model."


def write_full(source: Path, path: Path, family: str, *, with_clip: bool = True) -> Path:
    """Put the tiny model of `source` into a checkpoint, with a TAEF1 and, if so, a tiny CLIP-L."""
    import_comfy()
    from comfy.taesd import taesd

    from support.comfy_pack.text_encoder import tiny_clip

    tensors = {f"{MODEL_PREFIX}{name}": value for name, value in load_file(source).items()}
    halves = {"encoder": taesd.Encoder(16), "decoder": taesd.Decoder(16)}
    for half, module in halves.items():
        tensors |= _random(module, f"vae.taesd_{half}.")
    tensors |= {"vae.vae_scale": torch.tensor(0.3611), "vae.vae_shift": torch.tensor(0.1159)}
    if with_clip:
        tensors |= _random(tiny_clip(tiny(family).context_dim), "text_encoders.")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def _random(module: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel())
        for name, value in module.state_dict().items()
        if value.ndim
    }
