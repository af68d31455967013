"""Lets ComfyUI's own loader recognise the tiny checkpoints of `support.tiny_models`.

ComfyUI knows Z-Image by its width (3840) and hard-codes its 30 heads of 128. While
`tiny_models_detected()` is open, a NextDiT file of another width is read as a Z-Image whose heads
are counted from the file. Every model family gets one entry in `_CORRECTIONS`.

ComfyUI's modules are imported late: `support.native` puts them on the path first.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch

StateDict = Mapping[str, torch.Tensor]


def _correct_z_image(config: dict[str, Any], weights: StateDict, prefix: str) -> dict[str, Any]:
    if config["dim"] in (2304, 3840):  # Lumina 2 and Z-Image: ComfyUI knows their heads
        return config
    head_dim = weights[f"{prefix}layers.0.attention.q_norm.weight"].shape[0]
    heads = config["dim"] // head_dim
    return config | {
        "n_heads": heads,
        "n_kv_heads": heads,
        "axes_dims": [head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32 if f"{prefix}cap_pad_token" in weights else None,
        "tiny": True,
    }


def _correct_flux(config: dict[str, Any], weights: StateDict, prefix: str) -> dict[str, Any]:
    norm = weights[f"{prefix}double_blocks.0.img_attn.norm.query_norm.scale"]
    return config | {
        "num_heads": config["hidden_size"] // norm.shape[0],
        "axes_dim": _axes_dims(norm.shape[0]),
    }


def _correct_flux2(config: dict[str, Any], weights: StateDict, prefix: str) -> dict[str, Any]:
    norm = f"{prefix}double_blocks.0.img_attn.norm.query_norm."
    head_dim = next(weights[norm + n] for n in ("scale", "weight") if norm + n in weights).shape[0]
    heads = config["hidden_size"] // head_dim
    return config | {"num_heads": heads, "axes_dim": [head_dim // 4] * 4}


def _correct_qwen_image(config: dict[str, Any], weights: StateDict, prefix: str) -> dict[str, Any]:
    head_dim = weights[f"{prefix}transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return config | {
        "num_attention_heads": weights[f"{prefix}img_in.weight"].shape[0] // head_dim,
        "attention_head_dim": head_dim,
        "joint_attention_dim": weights[f"{prefix}txt_norm.weight"].shape[0],
        "axes_dims_rope": _axes_dims(head_dim),
    }


def _correct_qwen_image21(
    config: dict[str, Any], weights: StateDict, prefix: str
) -> dict[str, Any]:
    head_dim = weights[f"{prefix}transformer_blocks.0.attn.norm_q.weight"].shape[0]
    return config | {"axes_dims_rope": _axes_dims(head_dim)}


def _correct_wan(config: dict[str, Any], weights: StateDict, prefix: str) -> dict[str, Any]:
    return config | {
        "num_heads": config["dim"] // (16 if config["dim"] % 128 else 128),
        "text_dim": weights[f"{prefix}text_embedding.0.weight"].shape[1],
    }


def _correct_krea2(config: dict[str, Any], weights: StateDict, prefix: str) -> dict[str, Any]:
    attention, fusion = "blocks.0.attn", "txtfusion.layerwise_blocks.0.attn"

    def heads(path: str, linear: str) -> int:
        norm = weights[f"{prefix}{path}.qknorm.qnorm.scale"]
        return weights[f"{prefix}{path}.{linear}.weight"].shape[0] // norm.shape[0]

    return config | {
        "heads": heads(attention, "wq"),
        "kvheads": heads(attention, "wk"),
        "txtheads": heads(fusion, "wq"),
        "txtkvheads": heads(fusion, "wk"),
    }


def _axes_dims(head_dim: int) -> list[int]:
    """16, 56, 56 for the real 128."""
    along = head_dim * 7 // 32 * 2
    return [head_dim - 2 * along, along, along]


# ComfyUI's name of the architecture → what makes its detected config right for a tiny file.
_CORRECTIONS: dict[str, Callable[[dict[str, Any], StateDict, str], dict[str, Any]]] = {
    "lumina2": _correct_z_image,
    "flux": _correct_flux,
    "flux2": _correct_flux2,
    "qwen_image": _correct_qwen_image,
    "qwen_image21": _correct_qwen_image21,
    "wan2.1": _correct_wan,
    "krea2": _correct_krea2,
}


def _tiny_classes() -> list[type]:
    """ComfyUI's model classes, matching the corrected configs of the tiny files only."""
    from comfy import supported_models

    class TinyZImage(supported_models.ZImage):
        unet_config: ClassVar[dict[str, Any]] = {"image_model": "lumina2", "tiny": True}

        def __init__(self, unet_config: dict[str, Any]) -> None:
            super().__init__({key: value for key, value in unet_config.items() if key != "tiny"})

    return [TinyZImage]


@contextmanager
def tiny_models_detected() -> Iterator[None]:
    """While open, ComfyUI's model detection also recognises the tiny checkpoints."""
    from comfy import model_detection, supported_models

    stock_detect = model_detection.detect_unet_config

    def detect(
        state_dict: StateDict, key_prefix: str, metadata: dict[str, str] | None = None
    ) -> dict[str, Any] | None:
        config = stock_detect(state_dict, key_prefix, metadata=metadata)
        if config is None or config.get("image_model") not in _CORRECTIONS:
            return config
        return _CORRECTIONS[config["image_model"]](config, state_dict, key_prefix)

    classes = [*_tiny_classes(), *supported_models.models]
    with (
        mock.patch.object(model_detection, "detect_unet_config", detect),
        mock.patch.object(supported_models, "models", classes),
    ):
        yield
