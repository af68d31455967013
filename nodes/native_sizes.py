"""The sizes of a model file, as arguments of ComfyUI's model classes.

ComfyUI recognises models by what is in the file but hard-codes sizes that it cannot see there: head
counts above all (0.3.75: FLUX 24, Z-Image 30 at width 3840). Ours are inferred from the file
(`CheckpointInfo.config`) and equal ComfyUI's for the released models.
"""

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]


def _z_image(config: Config) -> dict[str, Any]:
    """For NextDiT (comfy/ldm/lumina/model.py)."""
    return {
        "dim": config["dim"],
        "n_heads": config["n_heads"],
        "n_kv_heads": config["n_heads"],
        "n_layers": config["n_layers"],
        "n_refiner_layers": config["n_refiner_layers"],
        "in_channels": config["in_channels"],
        "cap_feat_dim": config["cap_feat_dim"],
        "axes_dims": list(config["axes_dims"]),
        "rope_theta": config["rope_theta"],
        "time_scale": config["time_scale"],
        "pad_tokens_multiple": config["pad_tokens_multiple"],
        "z_image_modulation": True,
        # NextDiT rounds int(dim * multiplier) up to a multiple: this makes it ffn_dim exactly.
        "ffn_dim_multiplier": config["ffn_dim"] / config["dim"],
        "multiple_of": config["ffn_dim"],
    }


def _flux(config: Config) -> dict[str, Any]:
    """For Flux (comfy/ldm/flux/model.py)."""
    return {
        "hidden_size": config["dim"],
        "num_heads": config["num_heads"],
        "depth": config["num_double_blocks"],
        "depth_single_blocks": config["num_single_blocks"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "context_in_dim": config["context_dim"],
        "vec_in_dim": config["vector_dim"],
        "guidance_embed": config["guidance"],
        "axes_dim": list(config["axes_dims"]),
    }


def _qwen_image(config: Config) -> dict[str, Any]:
    """For QwenImageTransformer2DModel (comfy/ldm/qwen_image/model.py)."""
    patch_area = 4
    return {
        "num_layers": config["num_blocks"],
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": config["head_dim"],
        "in_channels": config["in_channels"] * patch_area,  # here, of a packed patch
        "out_channels": config["out_channels"],
        "joint_attention_dim": config["context_dim"],
        "axes_dims_rope": tuple(config["axes_dims"]),
    }


# CheckpointInfo.family → the function that translates CheckpointInfo.config.
NATIVE_SIZES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "flux": _flux,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
}
