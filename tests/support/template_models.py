"""Tiny files under the names of the published ones that the templates load."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from support.lora_files import write_lora
from support.tiny_models import tiny, write_fp8, write_tiny
from support.tiny_vae import (
    FLUX2_VAE_NAME,
    WAN_VAE_NAME,
    write_tiny_flux2_vae,
    write_tiny_vae,
    write_tiny_wan_vae,
)

_TEXT_ENCODER_MARK = "tp_test_text_encoder"  # as support/comfy_pack/text_encoder.py reads it


def write_template_models(models: Path) -> None:
    """Write all of them below ComfyUI's `models` folder."""
    diffusion = models / "diffusion_models"
    write_tiny("z_image", diffusion / "z_image_turbo_bf16.safetensors")
    for name in ("flux1-dev", "flux1-dev-kontext_fp8_scaled"):
        write_tiny("flux", diffusion / f"{name}.safetensors")
    for name in ("qwen_image_fp8_e4m3fn", "qwen_image_edit_2509_fp8_e4m3fn"):
        write_tiny("qwen_image", diffusion / f"{name}.safetensors")
    write_flux2_template_models(models)
    _write_text_encoders(models / "text_encoders")
    _write_vaes(models)
    _write_loras(models / "loras")


def write_flux2_template_models(models: Path) -> None:
    """Those of FLUX.2's alone."""
    name = "flux2_dev_fp8mixed.safetensors"
    whole = write_tiny("flux2", models / "diffusion_models" / f"whole_{name}")
    write_fp8(whole, models / "diffusion_models" / name, "mixed")
    whole.unlink()
    encoder = models / "text_encoders" / "mistral_3_small_flux2_fp8.safetensors"
    _write_text_encoder(encoder, f"{tiny('flux2').context_dim}")
    write_tiny_flux2_vae(models)
    (models / "vae" / FLUX2_VAE_NAME).rename(models / "vae" / "flux2-vae.safetensors")
    width = tiny("flux2").dim
    layer = "double_blocks.0.img_attn.proj", (width, width)
    write_lora(models / "loras" / "Flux_2-Turbo-LoRA_comfyui.safetensors", [layer])


def write_krea2_template_models(models: Path) -> None:
    """Those of Krea 2's alone."""
    name = "krea2_turbo_fp8_scaled.safetensors"
    whole = write_tiny("krea2", models / "diffusion_models" / f"whole_{name}")
    write_fp8(whole, models / "diffusion_models" / name, "comfy_quant")
    whole.unlink()
    sizes = tiny("krea2")
    encoder = models / "text_encoders" / "qwen3vl_4b_fp8_scaled.safetensors"
    _write_text_encoder(encoder, f"{sizes.num_text_layers * sizes.text_dim}")
    write_tiny_wan_vae(models)
    (models / "vae" / WAN_VAE_NAME).rename(models / "vae" / "qwen_image_vae.safetensors")
    layer = "blocks.0.attn.wo", (sizes.dim, sizes.dim)
    write_lora(models / "loras" / "krea2_darkbrush.safetensors", [layer])


def _write_text_encoder(path: Path, widths: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"nothing": torch.zeros(1)}, path, metadata={_TEXT_ENCODER_MARK: widths})


def _write_text_encoders(folder: Path) -> None:
    flux = tiny("flux")
    widths = {
        "qwen_3_4b": f"{tiny('z_image').context_dim}",
        "clip_l": f"{flux.context_dim},{flux.vector_dim}",
        "t5xxl_fp16": f"{flux.context_dim},{flux.vector_dim}",
        "qwen_2.5_vl_7b_fp8_scaled": f"{tiny('qwen_image').context_dim}",
    }
    for name, width in widths.items():
        _write_text_encoder(folder / f"{name}.safetensors", width)


def _write_vaes(models: Path) -> None:
    write_tiny_vae(models)
    # As ComfyUI's VAELoader puts the two files of TAEF1 together.
    weights = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}
    for half in ("encoder", "decoder"):
        part = load_file(models / "vae_approx" / f"taef1_{half}.safetensors")
        weights |= {f"taesd_{half}.{key}": value for key, value in part.items()}
    (models / "vae").mkdir(exist_ok=True)
    save_file(weights, models / "vae" / "ae.safetensors")
    write_tiny_wan_vae(models)
    (models / "vae" / WAN_VAE_NAME).rename(models / "vae" / "qwen_image_vae.safetensors")


def _write_loras(folder: Path) -> None:
    z_image, flux, qwen = tiny("z_image").dim, tiny("flux").dim, tiny("qwen_image").dim
    layers = {
        "pixel_art_style_z_image_turbo": ("layers.0.attention.out", z_image),
        "FLUX.1-Turbo-Alpha": ("double_blocks.0.img_attn.proj", flux),
        "Qwen-Image-Lightning-8steps-V1.0": ("transformer_blocks.0.attn.to_out.0", qwen),
    }
    for name, (layer, width) in layers.items():
        write_lora(folder / f"{name}.safetensors", [(layer, (width, width))])
