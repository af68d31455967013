"""GGUF files on real ranks against ComfyUI's own model with the same file's dequantised weights."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import test_flux, test_qwen_image, test_z_image
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.gguf_files import ARCHITECTURES, dequantised, write_gguf
from support.inputs import make_inputs
from support.native import native_model
from support.newer import is_known
from support.tiny_models import tiny, write_tiny

pytestmark = pytest.mark.process

INPUTS: dict[str, Callable[..., dict[str, Any]]] = {
    "z_image": functools.partial(test_z_image.make_inputs, 1, 9, 8, 20),
    "flux": functools.partial(test_flux.make_inputs, references=((9, 8),)),
    "flux2": functools.partial(make_inputs, tiny("flux2"), references=((9, 8),)),
    "qwen_image": functools.partial(test_qwen_image.make_inputs, references=((9, 8),)),
    "wan": functools.partial(
        make_inputs, tiny("wan"), frames=2, height=5, width=6, time_scale=1000.0
    ),
    "krea2": functools.partial(
        make_inputs, tiny("krea2"), references=((9, 8),), ref_latents_method="index"
    ),
}
KNOWN = [family for family in INPUTS if is_known(family)]


def write_both(folder: Path, family: str, kind: str, **options: Any) -> tuple[Path, Path]:
    """A GGUF file, and a safetensors file with its values."""
    whole = write_tiny(family, folder / "whole.safetensors")
    architecture = ARCHITECTURES[family]
    path = write_gguf(whole, folder / "m.gguf", kind, architecture=architecture, **options)
    values = folder / "values.safetensors"
    return path, dequantised(path, whole, values, options.get("prefix", ""))


def native(path: Path, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    named = inputs | {"transformer_options": {}}
    with torch.inference_mode():
        return native_model(path, dtype)(named.pop("x"), named.pop("timesteps"), **named)


@pytest.mark.rotates(5)
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("family", KNOWN)
def test_fp32(tmp_path: Path, remote: Remote, family: str, kind: str) -> None:
    path, values = write_both(tmp_path, family, kind)
    inputs = INPUTS[family]()
    expected = native(values, inputs)
    assert expected.std() > 0.1
    assert relative_error(remote(path, 2).evaluate(inputs), expected) <= FP32_TOLERANCE


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_padded_heads(tmp_path: Path, remote: Remote, family: str) -> None:
    """On five ranks, whose columns begin within a block."""
    path, values = write_both(tmp_path, family, "Q5_K")
    inputs = INPUTS[family]()
    found = remote(path, 5).evaluate(inputs)
    assert relative_error(found, native(values, inputs)) <= FP32_TOLERANCE


@pytest.mark.rotates(5)
@pytest.mark.parametrize("family", INPUTS)
def test_bf16(tmp_path: Path, remote: Remote, family: str) -> None:
    """The weights are rounded once, from what the blocks hold."""
    path, values = write_both(tmp_path, family, "Q5_1", prefix="model.diffusion_model.")
    inputs = INPUTS[family](dtype=torch.bfloat16)
    found, expected = (remote(p, 2, torch.bfloat16).evaluate(inputs) for p in (path, values))
    assert torch.equal(found, expected)
