"""VAEs with random weights, so that a test prompt can use pictures without a download.

`taef1` has the shape of TAEF1, the small preview autoencoder for 16-channel latents that ComfyUI's
VAELoader offers under this name when its two files lie in `models/vae_approx`. `tiny_wan` has that
of Qwen-Image's VAE, whose latents have a time axis. `tiny_flux2` has that of FLUX.2's, in full:
ComfyUI reads no other from a file. The pictures are noise.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.native import import_comfy

VAE_NAME = "taef1"
WAN_VAE_NAME = "tiny_wan.safetensors"
FLUX2_VAE_NAME = "tiny_flux2.safetensors"


def write_tiny_vae(models_folder: Path, *, latent_channels: int = 16, seed: int = 0) -> None:
    """Write `taef1_encoder` and `taef1_decoder` below ComfyUI's `models` folder."""
    import_comfy()
    from comfy.taesd import taesd

    generator = torch.Generator().manual_seed(seed)
    for name, build in (("encoder", taesd.Encoder), ("decoder", taesd.Decoder)):
        path = models_folder / "vae_approx" / f"taef1_{name}.safetensors"
        _write_random(path, build(latent_channels), generator)


def write_tiny_wan_vae(models_folder: Path, *, width: int = 8, seed: int = 0) -> None:
    """Write a Wan 2.1 VAE of few channels, `tiny_wan`, below ComfyUI's `models` folder."""
    import_comfy()
    from comfy.ldm.wan.vae import WanVAE

    # As ComfyUI's loader builds it, which reads the width from the file (0.3.75, comfy/sd.py).
    vae = WanVAE(
        dim=width,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=2,
        attn_scales=[],
        temperal_downsample=[False, True, True],
        dropout=0.0,
    )
    path = models_folder / "vae" / WAN_VAE_NAME
    _write_random(path, vae, torch.Generator().manual_seed(seed))


def write_tiny_flux2_vae(models_folder: Path, *, seed: int = 0) -> None:
    """Write a VAE of 128-channel latents in bf16, `tiny_flux2`, below ComfyUI's `models` folder."""
    import_comfy()
    from comfy.ldm.models.autoencoder import AutoencoderKL

    # As ComfyUI's loader builds it (0.3.75, comfy/sd.py); only the middle's blocks have attention.
    config = {"z_channels": 32, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    fixed = {"double_z": True, "resolution": 256, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
    with torch.device("meta"):
        vae = AutoencoderKL(
            ddconfig=config | fixed | {"attn_resolutions": [], "batch_norm_latent": True},
            embed_dim=32,
        )
    norm = {"bn.running_mean": torch.zeros(128), "bn.running_var": torch.ones(128)}
    path = models_folder / "vae" / FLUX2_VAE_NAME
    _write_random(path, vae, torch.Generator().manual_seed(seed), norm, torch.bfloat16)


def _write_random(
    path: Path,
    module: torch.nn.Module,
    generator: torch.Generator,
    fixed: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Random weights, but for the buffers in `fixed`."""
    weights = {
        key: (torch.randn(value.shape, generator=generator) / math.sqrt(value[0].numel())).to(dtype)
        for key, value in module.state_dict().items()
        if value.ndim and key not in (fixed or {})
    } | dict(fixed or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)
