"""LoRAs that widen the input (FLUX.1 Canny and Depth), on real ranks against ComfyUI's model."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, relative_error
from parity.test_lora import apply, change, digests, native, on_ranks, random

from support.inputs import make_inputs
from support.native import import_comfy, native_patcher
from support.newer import is_known
from support.pack import pack_module
from support.quantised_files import write_quantised
from support.tiny_models import Fp8Layout, tiny, tiny_shapes, write_fp8, write_tiny
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime, inspect_checkpoint
from tp_runtime.models import families

pytestmark = pytest.mark.process

WIDENED = {name: family.widens for name, family in families().items() if family.widens}
# Family → how its latents are, beside their channels.
LATENTS: dict[str, dict[str, Any]] = {
    "flux": {},
    "flux2": {},
    "wan": {"frames": 2, "height": 5, "width": 6, "time_scale": 1000.0},
}


@pytest.fixture(scope="module")
def weights() -> Iterator[ModuleType]:
    with pack_module("nodes.weights") as module:
        yield module


def inputs_of(family: str, times: int = 2) -> dict[str, Any]:
    """Of a model that takes that many times the channels of its file."""
    sizes = tiny(family, in_channels=times * tiny(family).in_channels)
    return make_inputs(sizes, **LATENTS[family])


def widening(family: str, times: int = 2, seed: int = 0) -> dict[Any, Any]:
    """A LoRA of the input, which widens it, and of a layer."""
    import_comfy()
    import comfy.weight_adapter

    rows, columns, *kernel = tiny_shapes(family)[WIDENED[family]]
    shape = [rows, times * columns, *kernel]
    points = len(kernel) * (1,)
    up, down = random(rows, 4, *points, seed=seed), random(4, *shape[1:], seed=seed + 1) * 0.05
    wider = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, shape))
    return {f"diffusion_model.{WIDENED[family]}": wider} | plain(family, seed)


def plain(family: str, seed: int, *, of_input: bool = False) -> dict[Any, Any]:
    """A LoRA that widens nothing; of the last layer of the first block, or of the input."""
    shapes = tiny_shapes(family)
    names = sorted(name for name in shapes if "blocks.0." in name and name.endswith("2.weight"))
    name = WIDENED[family] if of_input else names[-1]
    return {f"diffusion_model.{name}": change("lora", shapes[name], seed + 10)}


def assert_same(patcher: Any, remote: RemoteModel, inputs: dict[str, Any]) -> torch.Tensor:
    expected = native(patcher, inputs)
    assert relative_error(remote.evaluate(inputs), expected) <= FP32_TOLERANCE
    return expected


@pytest.mark.rotates(2)
@pytest.mark.parametrize("family", [family for family in WIDENED if is_known(family)])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_apply_change_remove(
    runtime: Runtime, weights: ModuleType, tmp_path: Path, family: str, tp_size: int
) -> None:
    """With other strengths and widths, and in turns with none."""
    path = write_tiny(family, tmp_path / "model.safetensors")
    patcher, remote = native_patcher(path), on_ranks(runtime, path, tp_size)
    narrow, wide = inputs_of(family, 1), inputs_of(family)
    before, as_in_file = digests(runtime, remote), remote.evaluate(narrow)
    found = []
    for strength in (1.0, 0.5):
        apply(patcher, remote, weights, [(widening(family), strength)])
        found.append(assert_same(patcher, remote, wide))
        apply(patcher, remote, weights, [])
        assert torch.equal(remote.evaluate(narrow), as_in_file)
        assert digests(runtime, remote) == before
    assert relative_error(found[0], found[1]) > 0.01
    apply(patcher, remote, weights, [(widening(family, 3), 1.0)])
    assert_same(patcher, remote, inputs_of(family, 3))
    apply(patcher, remote, weights, [(widening(family), 1.0)])
    assert_same(patcher, remote, wide)
    with pytest.raises(ValueError, match=r"\(batch, \d+, "):
        remote.evaluate(narrow)


def test_stacked_with_plain_loras(
    runtime: Runtime, weights: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of the input's own shape fits before the widening; after it, ComfyUI leaves it out."""
    path = write_tiny("flux", tmp_path / "model.safetensors")
    patcher, remote = native_patcher(path), on_ranks(runtime, path, 2)
    wide, of_input = inputs_of("flux"), plain("flux", 3, of_input=True)
    found = []
    for sets in (
        [(widening("flux"), 1.0)],
        [(of_input, 0.7), (widening("flux"), 1.0)],
        [(plain("flux", 4), 0.7), (widening("flux"), 0.5), (plain("flux", 5), -0.6)],
        [(widening("flux"), 1.0), (widening("flux", seed=6), 0.5)],
    ):
        apply(patcher, remote, weights, sets)
        found.append(assert_same(patcher, remote, wide))
    assert all(relative_error(one, found[0]) > 0.01 for one in found[1:])
    caplog.clear()
    apply(patcher, remote, weights, [(widening("flux"), 1.0), (of_input, 0.7)])
    assert "img_in.weight is left out" in caplog.text
    assert relative_error(assert_same(patcher, remote, wide), found[0]) <= FP32_TOLERANCE


@pytest.mark.parametrize("layout", ["plain", "scaled", "mixed"])
def test_fp8(runtime: Runtime, weights: ModuleType, tmp_path: Path, layout: Fp8Layout) -> None:
    """Rounded to fp8 with ComfyUI's own random numbers for the wider weight."""
    whole = write_tiny("flux", tmp_path / "whole.safetensors")
    path = write_fp8(whole, tmp_path / "fp8.safetensors", layout)
    plain_dtype = torch.float8_e4m3fn if layout == "plain" else None
    patcher = native_patcher(path, plain_dtype)
    remote = on_ranks(runtime, path, 2, "float8_e4m3fn" if plain_dtype else "float32")
    before = digests(runtime, remote)
    apply(patcher, remote, weights, [(widening("flux"), 0.8)])
    assert_same(patcher, remote, inputs_of("flux"))
    remote.patch(None, {})
    remote.evaluate(inputs_of("flux", 1))
    assert digests(runtime, remote) == before


def test_layouts_and_sleep(runtime: Runtime, weights: ModuleType, tmp_path: Path) -> None:
    """Ranks that divide a batch, or share the tokens; and after the weights were put away."""
    path = write_tiny("flux", tmp_path / "model.safetensors")
    patcher, spec = native_patcher(path), ModelSpec.of(str(path), "float32", "float32")
    for layout in ((1, 2, 1), (1, 1, 2)):
        tp_size, *others = layout
        remote = runtime.model(spec, GroupConfig(tp_size, "cpu", (), *others))
        apply(patcher, remote, weights, [(widening("flux"), 1.0)])
        for _ in range(2):
            remote.ensure_loaded()
            assert_same(patcher, remote, inputs_of("flux"))
            remote.sleep()


@pytest.mark.parametrize("family", WIDENED)
def test_sizes_with_another_shape(family: str) -> None:
    sizes, name = tiny(family), WIDENED[family]
    rows, columns, *kernel = tiny_shapes(family)[name]
    assert sizes.with_shape(name, (rows, columns, *kernel)) == sizes
    wide = sizes.with_shape(name, (rows, 2 * columns, *kernel))
    assert wide == tiny(family, in_channels=2 * sizes.in_channels)
    assert sizes.with_shape(name, (2 * rows, columns, *kernel)) is None


def test_what_cannot_be_widened(weights: ModuleType, tmp_path: Path) -> None:
    """Each is refused by the weight's name, its shapes, and what to do."""
    infos = {
        name: inspect_checkpoint(str(write_tiny(family, tmp_path / name, **changes)))
        for name, family, changes in (
            ("flux", "flux", {}),
            ("fill", "flux", {"in_channels": 96}),
            ("z_image", "z_image", {}),
        )
    }
    int8 = write_quantised(tmp_path / "flux", tmp_path / "int8", "int8")
    infos["int8"] = inspect_checkpoint(str(int8))
    of_input, wider = "diffusion_model.img_in.weight", widening("flux")
    lora = wider[of_input]
    rows, columns = tiny_shapes("flux")["img_in.weight"]

    def reshaped(*shape: int) -> Any:
        up, down = random(shape[0], 4, seed=1), random(4, shape[1], seed=2)
        return type(lora)(set(), (up, down, 1.0, None, None, list(shape)))

    def refuse(info: str, words: str, *stages: dict[str, Any]) -> None:
        lists = [
            {key: [(1.0, value, 1.0, None, None)] for key, value in of.items()} for of in stages
        ]
        with pytest.raises(ValueError, match=words):
            weights.patched_weights(infos[info], *lists)

    more = [rows, columns + 2], [rows + 16, columns]
    for shape in more:
        words = r"'img_in.weight' larger .*takes more columns of 'img_in.weight' only"
        refuse("flux", words, {of_input: reshaped(*shape)})
    refuse("int8", r"quantised \(int8_tensorwise\), which must be fp8", {of_input: lora})
    refuse("flux", "LoraLoaderModelOnly", {}, {of_input: lora})
    refuse("fill", r"\[384, 384\] one of \[384, 128\].*made for another model", {of_input: lora})
    key = "diffusion_model.x_embedder.weight"
    rows, columns = tiny_shapes("z_image")["x_embedder.weight"]
    refuse("z_image", "takes no other shapes", {key: reshaped(rows, 2 * columns)})
    unfit = reshaped(rows, 2 * columns)
    unfit.weights = (*unfit.weights[:5], [rows, 3 * columns])
    refuse("z_image", "shape", {key: unfit})
