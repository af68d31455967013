"""Prompts for the toy of `examples/shapes`, and what its pictures show."""

from pathlib import Path

import numpy as np
from PIL import Image

from examples.shapes.check import describe
from examples.shapes.scenes import Scene
from support.workflows import (
    GpuCount,
    Prompt,
    Sampling,
    node,
    text_to_latent,
    tp_loader,
    with_picture,
)

MODEL = "shapes_z_image.safetensors"
VAE = "shapes_vae.safetensors"
SAMPLING = Sampling(seed=42, steps=8, cfg=2.0)


def toy_prompt(text: str, gpu_count: GpuCount, sampling: Sampling = SAMPLING) -> Prompt:
    """Text → TP Sampler → latent and picture (`picture`)."""
    prompt = text_to_latent(tp_loader(MODEL, gpu_count), "TPSampler", sampling)
    prompt |= {
        "positive": node("ShapesPrompt", text=text),
        "negative": node("ShapesPrompt", text=""),
    }
    return with_picture(prompt, VAE)


def shown(picture: Path) -> Scene | None:
    """What a picture file shows; None: nothing."""
    with Image.open(picture) as image:
        return describe(np.asarray(image.convert("RGB")) / 255)
