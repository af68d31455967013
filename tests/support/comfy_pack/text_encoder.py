"""Text encoders for the tests: ComfyUI's loaders take files that say that they are such a one.

The published encoders have billions of parameters, and ComfyUI recognises them by their sizes. A
file of `support.template_models` names in its metadata what it stands for; the embedding is
random, and another for each text.

A checkpoint of `support.full_checkpoints` has a CLIP-L of few channels, which ComfyUI's own classes
compute: only what ComfyUI would take it for is corrected.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any
from unittest import mock

import comfy.sd
import comfy.sd1_clip
import torch
from comfy.supported_models_base import ClipTarget
from safetensors import safe_open

MARK = "tp_test_text_encoder"  # value: "width" or "width,pooled width"
_TOKENS = 16
_EMBEDDING = "clip_l.transformer.text_model.embeddings.token_embedding.weight"
_REAL_WIDTH = 768


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


def tiny_clip(width: int, **options: Any) -> torch.nn.Module:
    """ComfyUI's CLIP-L with two layers of that width."""
    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "projection_dim": width,
        "eos_token_id": 49407,
        "layer_norm_eps": 1e-5,
    }
    clip = partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=config)
    model: torch.nn.Module = comfy.sd1_clip.SD1ClipModel(clip_model=clip, **options)
    return model


@contextmanager
def tiny_clip_detected() -> Iterator[None]:
    """While open, a CLIP-L of another width than the real one is read as `tiny_clip`."""
    stock = comfy.sd.CLIP

    def make(
        target: Any, *args: Any, tokenizer_data: Mapping[str, torch.Tensor], **options: Any
    ) -> Any:
        embedding = tokenizer_data.get(_EMBEDDING)
        if embedding is not None and embedding.shape[1] != _REAL_WIDTH:
            tokenizer = comfy.sd1_clip.SD1Tokenizer
            target = ClipTarget(tokenizer, partial(tiny_clip, embedding.shape[1]))
        return stock(target, *args, tokenizer_data=tokenizer_data, **options)

    with mock.patch.object(comfy.sd, "CLIP", make):
        yield
