"""GGUF files on real ranks against ComfyUI's own model with the same file's dequantised weights."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from parity import test_flux, test_qwen_image, test_z_image
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from safetensors import safe_open

from support.gguf_files import ARCHITECTURES, dequantised, write_gguf
from support.inputs import make_inputs
from support.native import native_model
from support.newer import is_known
from support.newer_references import CASES, expected, inputs_of, write_case
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import CheckpointError, inspect_checkpoint

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


def write_told(folder: Path, source: Path, architecture: str, config: Any = None) -> Path:
    """A GGUF file of a safetensors file's weights and settings (`config`: others), as F32.

    Converters keep what the file tells of its model: a text by the same name.
    """
    whole = write_gguf(source, folder / "whole.gguf", "F32", architecture=architecture)
    with safe_open(source, framework="pt") as file:
        told = json.dumps(config) if config is not None else file.metadata()["config"]
    writer = gguf.GGUFWriter(folder / "told.gguf", architecture)
    writer.add_string("config", told)
    for tensor in gguf.GGUFReader(whole).tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "told.gguf"


def test_settings_that_no_shape_tells(tmp_path: Path, remote: Remote) -> None:
    """LTX-2's sizes are settings of the file."""
    source = write_case("ltx2", tmp_path / "whole.safetensors", CASES["ltx2"]["2.5"][0])
    path = write_told(tmp_path, source, "ltxv")
    assert inspect_checkpoint(str(path)).sizes == inspect_checkpoint(str(source)).sizes
    found = remote(path, 2).evaluate(inputs_of("ltx2", "2.5", torch.float32))
    assert relative_error(found, expected("ltx2", "2.5", torch.float32)) <= FP32_TOLERANCE


def test_a_variant_that_no_shape_tells(tmp_path: Path) -> None:
    """Wan Animate 2 has the tensors of Wan's image to video."""
    source = write_case("wan", tmp_path / "whole.safetensors", CASES["wan"]["Animate 2"][0])
    info = inspect_checkpoint(str(write_told(tmp_path, source, "wan")))
    assert info.sizes.poses_pass
    assert info.sizes == inspect_checkpoint(str(source)).sizes


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"transformer": {"causal_ar": True}}, "causal_ar to True"),
        (["transformer"], "metadata's config is"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, config: Any, words: str) -> None:
    source = write_tiny("wan", tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match=words):
        inspect_checkpoint(str(write_told(tmp_path, source, "wan", config)))
