"""Tiny ControlNets with random weights, in the formats that ComfyUI's Load ControlNet Model reads.

Sizes follow the tiny models of `support.tiny_models`; their residuals fit those models.
"""

from dataclasses import replace
from pathlib import Path

from support.tiny_models import (
    FluxSize,
    QwenImageSize,
    Shape,
    flux_shapes,
    qwen_image_shapes,
    write,
)


def write_flux_controlnet(path: Path, size: FluxSize | None = None) -> Path:
    """A ControlNet of XLabs' format: takes a picture, gives residuals of the double blocks.

    Source: ComfyUI 0.3.75, comfy/ldm/flux/controlnet.py.
    """
    size = replace(size or FluxSize(), single_blocks=0)
    shapes = _without(flux_shapes(size), "final_layer.")
    for index in range(size.double_blocks):
        shapes |= _linear(f"controlnet_blocks.{index}", size.dim, size.dim)
    shapes |= _linear("pos_embed_input", size.dim, 4 * size.in_channels)
    for index in range(0, 16, 2):
        shapes |= {
            f"input_hint_block.{index}.weight": (16, 16 if index else 3, 3, 3),
            f"input_hint_block.{index}.bias": (16,),
        }
    return write(path, shapes)


def write_qwen_image_controlnet(path: Path, size: QwenImageSize | None = None) -> Path:
    """A ControlNet of InstantX's format: takes a picture through a VAE.

    Source: ComfyUI 0.3.75, comfy/ldm/qwen_image/controlnet.py.
    """
    size = size or QwenImageSize()
    shapes = _without(qwen_image_shapes(size), "norm_out.", "proj_out.")
    for index in range(size.layers):
        shapes |= _linear(f"controlnet_blocks.{index}", size.dim, size.dim)
    shapes |= _linear("controlnet_x_embedder", size.dim, 64)
    return write(path, shapes)


def _without(shapes: dict[str, Shape], *prefixes: str) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefixes)}


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
