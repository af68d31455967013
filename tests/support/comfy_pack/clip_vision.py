"""CLIP vision for the tests: ComfyUI's loader takes files that say how wide their features are."""

import json
from functools import wraps
from typing import Any

import comfy.clip_vision
import torch
from safetensors import safe_open

MARK = "tp_test_clip_vision"  # value: JSON arguments of the class below
_HIDDEN_LAYERS = 24


class TinyCLIPVision:
    """What the stock nodes use of ComfyUI's CLIP vision model: features of a picture's patches."""

    def __init__(self, patches: int, width: int) -> None:
        self._patches = patches
        self._width = width

    def encode_image(self, image: torch.Tensor, **_: Any) -> Any:
        seed = round(float(image.double().mean()) * 1e6)
        generator = torch.Generator().manual_seed(seed)
        seen = comfy.clip_vision.Output()
        features = torch.randn(len(image), self._patches, self._width, generator=generator)
        seen.penultimate_hidden_states = seen.last_hidden_state = features
        layers = len(image), _HIDDEN_LAYERS, self._patches, self._width
        seen.all_hidden_states = torch.randn(layers, generator=generator)
        return seen


def extend_clip_vision_loader() -> None:
    """Have ComfyUI's loader read the marked files."""
    stock_load = comfy.clip_vision.load

    @wraps(stock_load)
    def load(path: str) -> Any:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(MARK)
        return TinyCLIPVision(**json.loads(said)) if said else stock_load(path)

    comfy.clip_vision.load = load
