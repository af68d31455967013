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

# Value: "width" or "width,pooled width"; then what is set beside it (see `TinyTextEncoder`).
MARK = "tp_test_text_encoder"
_TOKENS = 16
_EMBEDDING = "clip_l.transformer.text_model.embeddings.token_embedding.weight"
_REAL_WIDTH = 768


class TinyTextEncoder:
    """What the stock text nodes use of ComfyUI's CLIP.

    `unprocessed`: as LTX-2's says, that the model's connectors have not seen the text. `tags`: as
    MiniMax H3's says, which tokens are of pictures: the second to the fifth, if there are any.
    """

    def __init__(self, width: int, pooled_width: int = 0, adds: str = "") -> None:
        self._width = width
        self._pooled_width = pooled_width
        self._adds = adds
        self._has_pictures = False
        self.cond_stage_model = torch.nn.Module()  # in which a LoRA finds nothing to change

    @classmethod
    def marked(cls, said: str) -> "TinyTextEncoder":
        """The one that a file says that it is."""
        width, pooled_width, adds = [*said.split(","), "", ""][:3]
        return cls(int(width), int(pooled_width or 0), adds)

    def clone(self) -> "TinyTextEncoder":
        return self

    def add_patches(self, *_: Any) -> list[Any]:
        return []

    def tokenize(self, text: str, **given: Any) -> "_Tokens":
        self._has_pictures = any(given.get(name) for name in ("images", "minimax_ref_items"))
        return _Tokens(text)

    def encode_from_tokens_scheduled(self, tokens: "_Tokens", **_: Any) -> list[Any]:
        texts = "".join((tokens.text, *tokens.values()))
        seed = int.from_bytes(hashlib.sha256(texts.encode()).digest()[:6], "big")
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(1, _TOKENS, self._width, generator=generator)
        more: dict[str, Any] = {"pooled_output": None}  # as encoders without one have it
        if self._pooled_width:
            more["pooled_output"] = torch.randn(1, self._pooled_width, generator=generator)
        if self._adds == "unprocessed":
            more["unprocessed_ltxav_embeds"] = True
        if self._adds == "tags":
            tags = more["minimax_token_tags"] = torch.ones(_TOKENS, dtype=torch.long)
            tags[1:5] = 1 - self._has_pictures
        return [[embedding, more]]


class _Tokens(dict[str, str]):
    """Of each of a pair of encoders the whole text, until a node gives one of them another."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __missing__(self, encoder: str) -> str:
        return self.text


def extend_clip_loader() -> None:
    """Have ComfyUI's CLIP loaders read the marked files."""
    stock_load = comfy.sd.load_clip

    @wraps(stock_load)
    def load(ckpt_paths: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        for path in reversed(ckpt_paths):  # a checkpoint that says it says which model it is of
            with safe_open(path, framework="pt") as file:
                if said := (file.metadata() or {}).get(MARK):
                    return TinyTextEncoder.marked(said)
        return stock_load(ckpt_paths, *args, **kwargs)

    comfy.sd.load_clip = load


def extend_checkpoint_loader() -> None:
    """Have ComfyUI's Load Checkpoint give the text encoder that a file says that it has."""
    stock_load = comfy.sd.load_checkpoint_guess_config

    @wraps(stock_load)
    def load(ckpt_path: str, *args: Any, **kwargs: Any) -> Any:
        model, clip, *others = stock_load(ckpt_path, *args, **kwargs)
        with safe_open(ckpt_path, framework="pt") as file:
            said = (file.metadata() or {}).get(MARK)
        return model, TinyTextEncoder.marked(said) if said else clip, *others

    comfy.sd.load_checkpoint_guess_config = load


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
