"""fp8 files on real ranks against ComfyUI's own loading of the same file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import test_flux, test_qwen_image, test_z_image
from parity.conftest import FP32_TOLERANCE, relative_error
from safetensors import safe_open
from safetensors.torch import save_file

from support.inputs import make_inputs
from support.native import native_fp8
from support.newer import is_known
from support.sparse_files import one_block
from support.tiny_models import Fp8Layout, tiny, write_fp8, write_tiny
from tp_runtime.client import CheckpointError, GroupConfig, ModelSpec, Runtime, inspect_checkpoint

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

# Family → writes its tiny file, its inputs.
INPUTS: dict[str, dict[str, Any]] = {
    "z_image": test_z_image.make_inputs(1, 9, 8, 20),
    "flux": test_flux.make_inputs(references=((9, 8),)),
    "flux2": make_inputs(tiny("flux2"), references=((9, 8),)),
    "qwen_image": test_qwen_image.make_inputs(references=((9, 8),)),
    "wan": make_inputs(tiny("wan"), frames=2, height=5, width=6, time_scale=1000.0),
    "krea2": make_inputs(tiny("krea2"), references=((9, 8),), ref_latents_method="index"),
}
KNOWN = [family for family in INPUTS if is_known(family)]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family → its tiny file, of which the tests make theirs."""
    folder = tmp_path_factory.mktemp("wholes")
    return {family: write_tiny(family, folder / f"{family}.safetensors") for family in INPUTS}


@pytest.fixture(scope="module")
def runtime() -> Any:
    runtime = Runtime()
    yield runtime
    runtime.release()


def native(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    named = inputs | {"transformer_options": {}}
    with torch.inference_mode():
        return model(named.pop("x"), named.pop("timesteps"), **named)


def remote(
    runtime: Runtime, path: Path, weight_dtype: torch.dtype = torch.float32, tp_size: int = 2
) -> Any:
    name = str(weight_dtype).removeprefix("torch.")
    model = runtime.model(ModelSpec.of(str(path), name, "float32"), GroupConfig(tp_size, "cpu"))
    model.ensure_loaded()
    return model


@pytest.mark.process
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("family", KNOWN)
def test_plain(
    runtime: Runtime, wholes: dict[str, Path], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    inputs = INPUTS[family]
    path = write_fp8(wholes[family], tmp_path / "plain.safetensors", "plain", dtype)
    model = remote(runtime, path, dtype)
    assert relative_error(model.evaluate(inputs), native(native_fp8(path, dtype), inputs)) <= (
        FP32_TOLERANCE
    )
    assert max(model.loaded_bytes()) < 0.6 * path.stat().st_size  # one byte an element


@pytest.mark.process
@pytest.mark.parametrize("layout", ["scaled", "mixed"])
@pytest.mark.parametrize("family", KNOWN)
def test_with_scales(
    runtime: Runtime, wholes: dict[str, Path], tmp_path: Path, family: str, layout: Fp8Layout
) -> None:
    inputs = INPUTS[family]
    path = write_fp8(wholes[family], tmp_path / "quantised.safetensors", layout)
    model = remote(runtime, path)
    assert (
        relative_error(model.evaluate(inputs), native(native_fp8(path), inputs)) <= FP32_TOLERANCE
    )
    assert max(model.loaded_bytes()) < 0.6 * path.stat().st_size


@pytest.mark.process
def test_todays_layers_say_their_own_format(
    runtime: Runtime, wholes: dict[str, Path], tmp_path: Path
) -> None:
    """ComfyUI 0.3.75 does not read it: compared with the same numbers in the older form."""
    family, inputs = "qwen_image", INPUTS["qwen_image"]
    whole = wholes[family]
    older = write_fp8(whole, tmp_path / "mixed.safetensors", "mixed")
    newer = write_fp8(whole, tmp_path / "newer.safetensors", "comfy_quant")
    expected = remote(runtime, older).evaluate(inputs)
    assert torch.equal(remote(runtime, newer).evaluate(inputs), expected)


@pytest.mark.process
def test_a_fused_layer_of_which_a_part_is_not_quantised(
    runtime: Runtime, wholes: dict[str, Path], tmp_path: Path
) -> None:
    family, inputs = "qwen_image", INPUTS["qwen_image"]
    keep = {"transformer_blocks.0.attn.to_k", "transformer_blocks.1.img_mlp.net.2", "img_in"}
    path = write_fp8(wholes[family], tmp_path / "mixed.safetensors", "mixed", keep=keep)
    found = remote(runtime, path).evaluate(inputs)
    assert relative_error(found, native(native_fp8(path), inputs)) <= FP32_TOLERANCE


@pytest.mark.process
def test_padded_heads(runtime: Runtime, wholes: dict[str, Path], tmp_path: Path) -> None:
    family, inputs = "flux", INPUTS["flux"]
    path = write_fp8(wholes[family], tmp_path / "scaled.safetensors", "scaled")
    found = remote(runtime, path, tp_size=5).evaluate(inputs)
    assert relative_error(found, native(native_fp8(path), inputs)) <= FP32_TOLERANCE


def damaged(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """The file with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    return path


LAYER = "transformer_blocks.0.attn.to_k"


def without_scale(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del tensors[f"{LAYER}.weight_scale"]


def scale_of_rows(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    tensors[f"{LAYER}.weight_scale"] = torch.ones(len(tensors[f"{LAYER}.weight"]))


def unknown(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    described = json.loads(metadata["_quantization_metadata"])
    described["layers"][LAYER]["format"] = "float3"
    metadata["_quantization_metadata"] = json.dumps(described)


def unreadable(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    metadata["_quantization_metadata"] = '{"layers": '


def int8(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    del metadata["_quantization_metadata"]
    for key in [key for key in tensors if key.endswith(".weight_scale")]:
        del tensors[key]
    tensors[f"{LAYER}.weight"] = torch.zeros(tensors[f"{LAYER}.weight"].shape, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scale, f"lacks the scales {LAYER}.weight_scale of {LAYER}.weight"),
        (scale_of_rows, "has the shape"),
        (unknown, f"layer {LAYER} has the format 'float3'"),
        (unreadable, "how it is quantised"),
        (int8, f"{LAYER}.weight as I8"),
    ],
)
def test_files_that_cannot_be_loaded_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], None], words: str
) -> None:
    whole = write_tiny("qwen_image", tmp_path / "whole.safetensors", **one_block("qwen_image"))
    path = damaged(write_fp8(whole, tmp_path / "mixed.safetensors", "mixed"), change)
    with pytest.raises(CheckpointError, match=words):
        inspect_checkpoint(str(path))
