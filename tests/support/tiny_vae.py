"""A VAE with random weights, so that a test prompt can end in a picture without a download.

It has the shape of TAEF1, the small preview autoencoder for 16-channel latents that ComfyUI's
VAELoader offers as `taef1` when its two files lie in `models/vae_approx`. The pictures are noise.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.native import import_comfy

VAE_NAME = "taef1"


def write_tiny_vae(models_folder: Path, *, latent_channels: int = 16, seed: int = 0) -> None:
    """Write `taef1_encoder` and `taef1_decoder` below ComfyUI's `models` folder."""
    import_comfy()
    from comfy.taesd import taesd

    generator = torch.Generator().manual_seed(seed)
    for name, build in (("encoder", taesd.Encoder), ("decoder", taesd.Decoder)):
        weights = {
            key: torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel())
            for key, value in build(latent_channels).state_dict().items()
        }
        folder = models_folder / "vae_approx"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / f"taef1_{name}.safetensors")
