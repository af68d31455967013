"""Floating-point operations of one evaluation: products and attention, counted from the shapes."""

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]


def _linears(tokens: int, features: int) -> int:
    return 2 * tokens * features


def _attention(tokens: int, dim: int) -> int:
    return 4 * tokens**2 * dim


def _z_image(config: Config, image: int, text: int) -> int:
    dim, ffn = config["dim"], config["ffn_dim"]
    text += -text % 32
    block = 4 * dim**2 + 3 * dim * ffn

    def blocks(count: int, tokens: int) -> int:
        return count * (_linears(tokens, block) + _attention(tokens, dim))

    return blocks(config["n_refiner_layers"], image) + blocks(config["n_layers"], image + text)


def _flux(config: Config, image: int, text: int) -> int:
    dim, count = config["dim"], config["num_double_blocks"] + config["num_single_blocks"]
    # q, k, v, out and an MLP of four times the width, whether in one linear or in two streams.
    return count * (_linears(image + text, 12 * dim**2) + _attention(image + text, dim))


def _qwen_image(config: Config, image: int, text: int) -> int:
    dim, count = config["dim"], config["num_blocks"]
    return count * (_linears(image + text, 12 * dim**2) + _attention(image + text, dim))


# Model → operations for (config, image tokens, text tokens) of one batch item.
FLOPS: dict[str, Callable[[Config, int, int], int]] = {
    "z_image": _z_image,
    "flux": _flux,
    "qwen_image": _qwen_image,
}
