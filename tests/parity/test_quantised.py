"""Quantised files on real ranks, against what ComfyUI 0.33 computes with them (stored references).

A row cut divides the features over which an input is quantised, so a rank's scale of a token is its
own: finer than ComfyUI's. The bar is then the distance from the model before it was quantised.
"""

from pathlib import Path

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.native import import_comfy, native_patcher
from support.pack import pack_module
from support.quantised_files import write_quantised
from support.quantised_references import (
    CASES,
    PATCHED,
    PATCHED_FAMILY,
    PLAIN,
    STRENGTH,
    inputs_of,
    lora,
    reference,
    write_case,
)
from tp_runtime.client import inspect_checkpoint

pytestmark = pytest.mark.process

# Inputs are quantised in these, so another order of additions may tip a rounding.
OF_INTEGERS = ("int8", "int8_scalar", "int8_convrot", "w4a4", "w4a8", "w4a8_plain")
TIPPED = 0.35  # of the distance that quantising makes, for the same scales
# Sizes beside 2: one, and those at which heads are padded (30 to 32, 20 to 21, 24 to 25).
OTHER_SIZES = [
    ("qwen_image", "int8_convrot", 1),
    ("flux", "w4a8", 1),
    ("wan", "int8_convrot", 3),
    ("z_image", "int8_convrot", 4),
    ("flux", "fp8", 5),
    ("flux2", "int8_convrot", 4),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def assert_as_good_as_comfyui(
    found: torch.Tensor, family: str, name: str, tp_size: int, patched: bool = False
) -> None:
    """Equal to ComfyUI's result, or no further from that of the plain weights."""
    comfy, exact = reference(family, name, patched), reference(family, PLAIN, patched)
    apart, ours, theirs = (
        relative_error(one, other)
        for one, other in ((found, comfy), (found, exact), (comfy, exact))
    )
    print(
        f"{family} {name} tp {tp_size}: {apart:.2e} from ComfyUI's, {ours:.4f} from the plain"
        f" model, ComfyUI's {theirs:.4f}"
    )
    if name not in OF_INTEGERS:
        assert apart <= FP32_TOLERANCE
        return
    assert ours <= 1.05 * theirs  # of a tiny model: two draws of the same size
    if tp_size == 1:
        assert apart <= TIPPED * theirs


@pytest.mark.rotates(3)
@pytest.mark.parametrize(("family", "name"), CASES)
def test_on_two_ranks(folder: Path, remote: Remote, family: str, name: str) -> None:
    path = write_case(family, name, folder)
    found = remote(path, 2).evaluate(inputs_of(family))
    assert_as_good_as_comfyui(found, family, name, 2)


@pytest.mark.rotates(2)
@pytest.mark.parametrize(("family", "name", "tp_size"), OTHER_SIZES)
def test_on_other_sizes(folder: Path, remote: Remote, family: str, name: str, tp_size: int) -> None:
    path = write_case(family, name, folder)
    found = remote(path, tp_size).evaluate(inputs_of(family))
    assert_as_good_as_comfyui(found, family, name, tp_size)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("name", PATCHED)
def test_patched(folder: Path, remote: Remote, name: str) -> None:
    """The values are patched, and quantised again with ComfyUI's random numbers."""
    import_comfy()
    import comfy.sd

    model = remote(write_case(PATCHED_FAMILY, name, folder), 2)
    inputs = inputs_of(PATCHED_FAMILY)
    before = model.evaluate(inputs)
    plain = native_patcher(write_case(PATCHED_FAMILY, PLAIN, folder))
    plain, _ = comfy.sd.load_lora_for_models(plain, None, lora(), STRENGTH, 0)
    with pack_module("nodes.weights") as weights:
        model.patch(object(), weights.patched_weights(model.info, plain.patches))
        assert_as_good_as_comfyui(model.evaluate(inputs), PATCHED_FAMILY, name, 2, patched=True)
        model.patch(None, {})
    assert torch.equal(model.evaluate(inputs), before)


def test_weights_stay_quantised(folder: Path, remote: Remote) -> None:
    model = remote(write_case("qwen_image", "int8_convrot", folder), 2)
    size = inspect_checkpoint(model.spec.path).weight_bytes(4)
    assert max(model.loaded_bytes()) <= 1.03 * size / 2


def test_files_in_which_layers_differ(folder: Path, remote: Remote) -> None:
    """Several formats, plain layers, and one layer whose linears differ, which is dequantised."""
    whole = write_case("qwen_image", PLAIN, folder)
    block = "transformer_blocks.0"
    path = write_quantised(
        whole,
        folder / "mixed.safetensors",
        "int8_convrot",
        saying="metadata",
        keep={"img_in", "proj_out", f"{block}.attn.to_k"},
        others={f"{block}.img_mlp.net.2": "nvfp4_awq", f"{block}.attn.to_q": "fp8"},
        prefix="model.diffusion_model.",
    )
    found = remote(path, 2).evaluate(inputs_of("qwen_image"))
    error = relative_error(found, reference("qwen_image", PLAIN))
    assert 0.01 < error < 0.1


def test_bf16(folder: Path, remote: Remote) -> None:
    path = write_case("qwen_image", "int8_convrot", folder)
    inputs = inputs_of("qwen_image")
    names = ("x", "context")
    rounded = inputs | {name: inputs[name].bfloat16() for name in names}
    found = remote(path, 2, torch.bfloat16).evaluate(rounded)
    exact = reference("qwen_image", PLAIN)
    comfy = relative_error(reference("qwen_image", "int8_convrot"), exact)
    assert relative_error(found.float(), exact) <= 2 * comfy
