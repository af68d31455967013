"""Tiny ControlNets with random weights, in the formats that ComfyUI's Load ControlNet Model reads.

Sizes follow the tiny models of `support.tiny_models`; their residuals fit those models.
"""

from pathlib import Path

import torch

from support.native import import_comfy
from support.tiny_models import Shape, tiny, tiny_shapes, write


def write_flux_controlnet(path: Path) -> Path:
    """A ControlNet of XLabs' format: takes a picture, gives residuals of the double blocks.

    Source: ComfyUI 0.3.75, comfy/ldm/flux/controlnet.py.
    """
    size = tiny("flux")
    shapes = _without(tiny_shapes("flux", num_singles=0), "final_layer.")
    for index in range(size.num_doubles):
        shapes |= _linear(f"controlnet_blocks.{index}", size.dim, size.dim)
    shapes |= _linear("pos_embed_input", size.dim, 4 * size.in_channels)
    for index in range(0, 16, 2):
        shapes |= {
            f"input_hint_block.{index}.weight": (16, 16 if index else 3, 3, 3),
            f"input_hint_block.{index}.bias": (16,),
        }
    return write(path, shapes)


def write_qwen_image_controlnet(path: Path) -> Path:
    """A ControlNet of InstantX's format: takes a picture through a VAE.

    Source: ComfyUI 0.3.75, comfy/ldm/qwen_image/controlnet.py.
    """
    size = tiny("qwen_image")
    shapes = _without(tiny_shapes("qwen_image"), "norm_out.", "proj_out.")
    for index in range(size.num_blocks):
        shapes |= _linear(f"controlnet_blocks.{index}", size.dim, size.dim)
    shapes |= _linear("controlnet_x_embedder", size.dim, 64)
    return write(path, shapes)


def write_qwen_image_fun_controlnet(path: Path) -> Path:
    """A Fun ControlNet, of newer releases than 0.3.75: it calls modules of the model itself.

    Source: ComfyUI 0.33, comfy/ldm/qwen_image/controlnet.py.
    """
    import_comfy()
    from comfy.ldm.qwen_image.controlnet import QwenImageFunControlNetModel
    from comfy.ops import disable_weight_init

    size = tiny("qwen_image")
    with torch.device("meta"):
        model = QwenImageFunControlNetModel(
            control_in_features=132,  # of a control picture, a mask and a picture to fill in
            inner_dim=size.dim,
            num_attention_heads=size.num_heads,
            attention_head_dim=size.head_dim,
            num_control_blocks=5,
            main_model_double=60,
            injection_layers=(0, 12, 24, 36, 48),
            operations=disable_weight_init,
        )
    return write(path, {name: tuple(value.shape) for name, value in model.state_dict().items()})


def _without(shapes: dict[str, Shape], *prefixes: str) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if not name.startswith(prefixes)}


def _linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


# Family → writes its tiny ControlNet.
CONTROLNETS = {"flux": write_flux_controlnet, "qwen_image": write_qwen_image_controlnet}
