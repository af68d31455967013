"""Text encoders for the tests: ComfyUI's loaders take files that say that they are such a one.

The published encoders have billions of parameters, and ComfyUI recognises them by their sizes. A
file of `support.template_models` names in its metadata what it stands for; the embedding is
random, and another for each text.
"""

import hashlib
from collections.abc import Sequence
from functools import wraps
from typing import Any

import comfy.sd
import torch
from safetensors import safe_open

MARK = "tp_test_text_encoder"  # value: "width" or "width,pooled width"
_TOKENS = 16


class TinyTextEncoder:
    """What the stock text nodes use of ComfyUI's CLIP."""

    def __init__(self, width: int, pooled_width: int = 0) -> None:
        self._width = width
        self._pooled_width = pooled_width

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> list[Any]:
        seed = int.from_bytes(hashlib.sha256(tokens.encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(1, _TOKENS, self._width, generator=generator)
        more: dict[str, Any] = {"pooled_output": None}  # as encoders without one have it
        if self._pooled_width:
            more["pooled_output"] = torch.randn(1, self._pooled_width, generator=generator)
        return [[embedding, more]]


def extend_clip_loader() -> None:
    """Have ComfyUI's CLIP loaders read the marked files."""
    stock_load = comfy.sd.load_clip

    @wraps(stock_load)
    def load(ckpt_paths: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        with safe_open(ckpt_paths[0], framework="pt") as file:
            widths = (file.metadata() or {}).get(MARK)
        if widths is None:
            return stock_load(ckpt_paths, *args, **kwargs)
        return TinyTextEncoder(*map(int, widths.split(",")))

    comfy.sd.load_clip = load
