"""Z-Image's Fun Union ControlNets on real ranks against ComfyUI's own model and objects."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.z_image_controls import (
    CASES,
    KIND,
    PADDED,
    RELEASES,
    SIZES,
    expected,
    inputs_of,
    tensors_of,
    write_model,
)
from tp_runtime.client import MODEL_PATCHES, InputError, RemoteModel, RemotePatch

pytestmark = pytest.mark.process

Listed = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("controls") / "tiny.safetensors")


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("controls") / "padded.safetensors", PADDED)


def listed(model: RemoteModel, name: str) -> tuple[dict[str, Any], Listed, list[RemotePatch]]:
    """Inputs of a case, its ControlNets among them, and what keeps these on the ranks."""
    inputs, hints = inputs_of(name)
    found, patches = [], []
    for seed, ((release, strength, _), hint) in enumerate(
        zip(CASES[name].controls, hints, strict=True)
    ):
        tensors = tensors_of(release, seed, CASES[name].sizes)
        patches.append(model.model_patch(KIND, lambda found=tensors: found))
        broken = RELEASES[release].get("broken", False)
        one = {"name": patches[-1].name, "strength": strength, "hint": hint, "broken": broken}
        found.append(one)
    return inputs, found, patches


def assert_equal_to_native(path: Path, model: RemoteModel, name: str) -> None:
    inputs, controls, _patches = listed(model, name)
    found = model.evaluate({**inputs, MODEL_PATCHES: controls})
    stock = expected(path, name)
    assert relative_error(found, stock) <= FP32_TOLERANCE
    if name != "strength 0":
        assert relative_error(model.evaluate(inputs), stock) > 0.01


@pytest.mark.rotates(3)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sizes is SIZES])
def test_fp32_on_two_ranks(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 2), name)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("name", ["1", "2.1"])
def test_fp32_on_one_rank(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 1), name)


@pytest.mark.parametrize("name", ["1, padded", "2.1, padded"])
def test_fp32_on_four_ranks(padded: Path, remote: Remote, name: str) -> None:
    """Fifteen heads, and one that pads."""
    assert_equal_to_native(padded, remote(padded, 4), name)


@pytest.mark.parametrize("name", ["2.1", "odd sizes, of tokens that are padded"])
def test_ranks_that_share_tokens(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 1, sequence_size=2), name)


@pytest.mark.parametrize("name", ["one picture for a batch", "a picture for each"])
def test_batch_groups(checkpoint: Path, remote: Remote, name: str) -> None:
    assert_equal_to_native(checkpoint, remote(checkpoint, 1, batch_groups=2), name)


def test_its_memory_is_shared_and_sleeps(checkpoint: Path, remote: Remote) -> None:
    """But for what heads that only pad take, and the embedder: of real sizes, next to nothing."""
    model = remote(checkpoint, 2)
    alone = model.loaded_bytes()
    inputs, controls, _patches = listed(model, "2.1")
    first = model.evaluate({**inputs, MODEL_PATCHES: controls})
    whole = sum(tensor.nbytes for tensor in tensors_of("2.1").values())
    of_each = [now - before for now, before in zip(model.loaded_bytes(), alone, strict=True)]
    assert max(of_each) <= 1.05 * whole / 2
    model.sleep()
    assert not any(model.loaded_bytes())
    assert model.evaluate({**inputs, MODEL_PATCHES: controls}).equal(first)


def test_a_control_of_another_model_is_refused(checkpoint: Path, remote: Remote) -> None:
    model, tensors = remote(checkpoint, 2), tensors_of("1")
    with pytest.raises(InputError, match="has no tensor 'control_all_x_embedder"):
        model.model_patch(KIND, lambda: {n: t for n, t in tensors.items() if "embed" not in n})
    wider = {n: torch.cat([t, t]) if ".attention.out" in n else t for n, t in tensors.items()}
    with pytest.raises(InputError, match="12 heads of 48 and 2 refiners; Z-Image has 6 of 48"):
        model.model_patch(KIND, lambda: wider)


def test_pictures_that_do_not_fit_are_refused(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 2)
    inputs, controls, _patches = listed(model, "one picture for a batch")
    for shape in ((2, 33, 8, 12), (1, 16, 8, 12), (1, 33, 8, 14)):
        controls[0]["hint"] = torch.zeros(shape)
        with pytest.raises(InputError, match=r"takes \(3, 33, 8, 12\) here"):
            model.evaluate({**inputs, MODEL_PATCHES: controls})
    assert model.evaluate(inputs).isfinite().all()
