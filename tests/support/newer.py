"""Families whose classes only newer releases of ComfyUI have than 0.3.75, which CI tests."""

from support.paths import comfyui_path
from tp_runtime.models import families

# Family → the file or folder of ComfyUI that has its class.
_CLASSES = {
    "krea2": "comfy/ldm/krea2/model.py",
    "ltx2": "comfy/ldm/lightricks/av_model.py",
    "minimax_h3": "comfy/ldm/minimax/model.py",
    "qwen_image_21": "comfy/ldm/qwen_image21",
}


def is_newer(family: str) -> bool:
    """Whether 0.3.75 lacks the family."""
    return family in _CLASSES


def is_known(family: str) -> bool:
    """Whether the ComfyUI that is tested has the family."""
    return not is_newer(family) or (comfyui_path() / _CLASSES[family]).exists()


def known() -> list[str]:
    """The families that the ComfyUI that is tested has."""
    return [name for name in families() if is_known(name)]
