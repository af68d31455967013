"""Model patches on real ranks against ComfyUI's own objects, called by ComfyUI's own models."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.native import import_comfy, native_model
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import MODEL_PATCHES, InputError, RemoteModel, RemotePatch

pytestmark = pytest.mark.process

SIZES = tiny("qwen_image")
KIND = "QwenImageBlockWiseControlNet"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen_image", tmp_path_factory.mktemp("patches") / "tiny.safetensors")


def small_model(seed: int, dim: int = SIZES.dim, num_layers: int = SIZES.num_blocks) -> Any:
    """ComfyUI's block-wise ControlNet, with random weights."""
    import_comfy()
    from comfy_extras.nodes_model_patch import QwenImageBlockWiseControlNet

    found = QwenImageBlockWiseControlNet(num_layers=num_layers, dim=dim, operations=torch.nn)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in found.named_parameters():
        scale, base = (0.5, 1.0) if "_rms" in name else (dim**-0.5, 0.0)
        weight.data = base + scale * torch.randn(weight.shape, generator=generator)
    return found.requires_grad_(False)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(batch: int, height: int, width: int, **others: Any) -> dict[str, Any]:
    return {
        "x": random(1, batch, 16, 1, height, width),
        "timesteps": torch.linspace(0.2, 0.9, batch),
        "context": random(2, batch, 20, 64),
        "transformer_options": {},
    } | others


def in_stock(small: Any, hint: torch.Tensor, strength: float) -> Any:
    """What ComfyUI's node puts into a model; it has encoded its picture already."""
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch

    patch = object.__new__(DiffSynthCnetPatch)
    patch.model_patch = SimpleNamespace(model=small)
    patch.vae = SimpleNamespace(spacial_compression_encode=lambda: 8)
    patch.strength, patch.encoded_image = strength, hint
    return patch


def native(path: Path, inputs: dict[str, Any], patches: list[Any]) -> torch.Tensor:
    named = {**inputs, "transformer_options": dict(inputs["transformer_options"])}
    height, width = inputs["x"].shape[-2:]
    for patch in patches:
        patch.encoded_image_size = (8 * height, 8 * width)
    named["transformer_options"]["patches"] = {"double_block": patches}
    with torch.inference_mode():
        found: torch.Tensor = native_model(path)(named.pop("x"), named.pop("timesteps"), **named)
    return found


def on_ranks(model: RemoteModel, *smalls: Any) -> list[RemotePatch]:
    return [model.model_patch(KIND, small.state_dict) for small in smalls]


def listed(
    patches: list[RemotePatch], hints: list[torch.Tensor], *strengths: float
) -> list[dict[str, Any]]:
    return [
        {"name": patch.name, "hint": hint, "strength": strength}
        for patch, hint, strength in zip(patches, hints, strengths, strict=True)
    ]


# Name → shape of the latent, strengths, items of each picture, and other inputs.
REFERENCES = {"ref_latents": [random(5, 1, 16, 1, 10, 8), random(6, 1, 16, 1, 6, 12)]}
CONTROL = {"control": {"input": [random(7, 1, 64, SIZES.dim), None, random(8, 1, 30, SIZES.dim)]}}
SKIP = {"transformer_options": {"skip_blocks": {"double_block": [1]}}}
CASES: dict[str, tuple[tuple[int, int, int], tuple[float, ...], int, dict[str, Any]]] = {
    "one": ((1, 16, 16), (1.0,), 1, {}),
    "odd sizes": ((1, 17, 15), (0.7,), 1, {}),
    "one picture for a batch": ((3, 8, 12), (1.0,), 1, {}),
    "a picture for each": ((2, 8, 12), (-0.6,), 2, {}),
    "two at once": ((2, 16, 16), (0.8, 1.7), 1, {}),
    "strength 0": ((1, 16, 16), (0.0,), 1, {}),
    "with references": ((1, 16, 16), (1.0,), 1, REFERENCES),
    "with a ControlNet": ((1, 16, 16), (1.0, 0.5), 1, CONTROL),
}


def case(name: str) -> tuple[dict[str, Any], list[torch.Tensor], tuple[float, ...]]:
    shape, strengths, items, others = CASES[name]
    length = -(-shape[1] // 2) * -(-shape[2] // 2)
    hints = [random(20 + i, items, length, SIZES.dim) for i in range(len(strengths))]
    return make_inputs(*shape, **others), hints, strengths


def assert_equal_to_native(path: Path, model: RemoteModel, name: str) -> None:
    inputs, hints, strengths = case(name)
    smalls = [small_model(index) for index in range(len(hints))]
    patches = on_ranks(model, *smalls)
    found = model.evaluate({**inputs, MODEL_PATCHES: listed(patches, hints, *strengths)})
    in_model = [in_stock(*one) for one in zip(smalls, hints, strengths, strict=True)]
    expected = native(path, inputs, in_model)
    assert relative_error(found, expected) <= FP32_TOLERANCE
    if any(strengths):
        assert relative_error(model.evaluate(inputs), expected) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_fp32_on_two_ranks(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 2), name)


# On five ranks, a width of 384 is padded.
@pytest.mark.parametrize("name", ["odd sizes", "two at once"])
@pytest.mark.parametrize("tp_size", [1, 4, 5])
def test_fp32(checkpoint: Path, remote: Remote, tp_size: int, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, tp_size), name)


@pytest.mark.parametrize("name", ["odd sizes", "with references", "with a ControlNet"])
def test_ranks_that_share_tokens(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 1, sequence_size=2), name)


@pytest.mark.parametrize("name", ["one picture for a batch", "a picture for each"])
def test_batch_groups(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 1, batch_groups=2), name)


def test_skipped_blocks(checkpoint: Path, remote: Remote) -> None:
    """ComfyUI calls patches after a block that a node leaves out, too."""
    inputs, hints, strengths = case("two at once")
    model = remote(checkpoint, 2)
    smalls = [small_model(index) for index in range(2)]
    patches = on_ranks(model, *smalls)
    asked = {**inputs, **SKIP, MODEL_PATCHES: listed(patches, hints, *strengths)}
    left_out = {"patches_replace": {"dit": {("double_block", 1): lambda given, _: given}}}
    expected = native(
        checkpoint,
        inputs | {"transformer_options": left_out},
        [in_stock(*one) for one in zip(smalls, hints, strengths, strict=True)],
    )
    assert relative_error(model.evaluate(asked), expected) <= FP32_TOLERANCE


def test_its_memory_is_shared_and_given_back(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 4)
    alone = model.loaded_bytes()
    inputs, hints, _ = case("one")
    small = small_model(3)
    patches = on_ranks(model, small)
    asked = {**inputs, MODEL_PATCHES: listed(patches, hints, 1.0)}
    first = model.evaluate(asked)
    whole = sum(
        tensor.nbytes
        for name, tensor in small.state_dict().items()
        if name.startswith("controlnet_blocks.")
    )
    of_each = [now - before for now, before in zip(model.loaded_bytes(), alone, strict=True)]
    assert max(of_each) <= 1.05 * whole / 4
    model.sleep()
    assert not any(model.loaded_bytes())
    assert model.evaluate(asked).equal(first)
    patches.clear()
    model.sleep()  # unused shards are freed when the group changes next
    model.ensure_loaded()
    assert model.loaded_bytes() == alone


def test_it_comes_back_on_a_new_group(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 2)
    inputs, hints, _ = case("one")
    patches = on_ranks(model, small_model(3))
    asked = {**inputs, MODEL_PATCHES: listed(patches, hints, 1.0)}
    first = model.evaluate(asked)
    model._group.close()
    model.ensure_loaded()
    assert model.evaluate(asked).equal(first)


class CancelledError(Exception):
    """What ComfyUI's check for a cancel raises."""


def cancel_after(num_polls: int) -> Callable[[], None]:
    calls = iter(range(num_polls))

    def poll() -> None:
        if next(calls, None) is None:
            raise CancelledError

    return poll


@pytest.mark.parametrize("num_polls", [0, 1, 2, 4, 8])
def test_a_cancel_while_it_is_loaded(checkpoint: Path, remote: Remote, num_polls: int) -> None:
    model = remote(checkpoint, 2)
    inputs, hints, _ = case("one")
    small = small_model(num_polls)
    kept = on_ranks(model, small)
    asked = {**inputs, MODEL_PATCHES: listed(kept, hints, 1.0)}
    with contextlib.suppress(CancelledError):
        model.evaluate(asked, cancel_after(num_polls))
        assert num_polls, "the first check is before anything"
    expected = native(checkpoint, inputs, [in_stock(small, hints[0], 1.0)])
    assert relative_error(model.evaluate(asked), expected) <= FP32_TOLERANCE


def test_a_patch_of_another_model_is_refused(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 2)
    with pytest.raises(InputError, match=r"3 blocks of width 96; Qwen-Image has 3 of width 384"):
        on_ranks(model, small_model(0, dim=96))
    with pytest.raises(InputError, match="1 blocks of width 384"):
        on_ranks(model, small_model(0, num_layers=1))
    with pytest.raises(InputError, match=r"has no tensor 'controlnet_blocks.0.input_proj.weight'"):
        model.model_patch(KIND, dict)


def test_pictures_that_do_not_fit_are_refused(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 2)
    inputs, _, _ = case("one picture for a batch")
    patches = on_ranks(model, small_model(0))
    for shape, text in (((2, 24, 384), "as many pictures"), ((1, 25, 384), "25 tokens")):
        with pytest.raises(InputError, match=text):
            model.evaluate({**inputs, MODEL_PATCHES: listed(patches, [random(0, *shape)], 1.0)})
    assert model.evaluate(inputs).isfinite().all()
