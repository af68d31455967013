"""A few steps of the toy's training, and the file that comes of it."""

import argparse
import re
from pathlib import Path

import pytest
import torch

from examples.shapes.network import CAPTION_TOKENS, Decoder, Size, ZImage, encoder_weight
from examples.shapes.scenes import all_scenes, prompts
from examples.shapes.train import (
    VOCABULARY,
    draw_pool,
    rounded,
    tokens,
    train_decoder,
    train_transformer,
    write,
)
from tp_runtime.client import inspect_checkpoint

SCENES = all_scenes()[:3]
OPTIONS = argparse.Namespace(
    seed=0,
    batch=4,
    steps=6,
    rate=5e-3,
    ema=0.9,
    compile=False,
    decoder_batch=2,
    decoder_steps=8,
)


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss=([\d.]+)", printed)]


def test_the_transformer_learns_and_is_a_z_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    net = ZImage(Size(layers=1))
    pool = draw_pool(SCENES, 16, encoder_weight(), 0, generator)
    table = torch.randn(len(VOCABULARY), net.size.caption_dim)
    weights = train_transformer(net, pool, table, OPTIONS, generator, minutes=None)
    found = losses(capsys.readouterr().out)
    assert len(found) == OPTIONS.steps
    assert found[-1] < 0.95 * found[0]

    path = tmp_path / "toy.safetensors"
    write(path, rounded(weights, torch.bfloat16))
    info = inspect_checkpoint(str(path))
    assert info.family.name == "z_image"
    assert info.sizes.num_heads == net.size.heads


def test_the_decoder_learns(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    decoder = train_decoder(SCENES[:1], encoder_weight(), OPTIONS, generator)
    assert isinstance(decoder, Decoder)
    found = losses(capsys.readouterr().out)
    assert found[-1] < found[0]


def test_every_prompt_fits() -> None:
    for scene in all_scenes()[::97]:
        for prompt in prompts(scene):
            assert len(tokens(prompt)) == CAPTION_TOKENS
