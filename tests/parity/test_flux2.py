"""FLUX.2 on real ranks against ComfyUI's own Flux, on the same tiny file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from parity.suite import REFERENCES_MOVE, Cases, ParityTests, assert_equal_to_native, native

from support.inputs import make_inputs
from support.newer_references import CASES, expected, inputs_of
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

SIZES = tiny("flux2")
ROPE = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 3.0}
REFERENCES = {"references": ((5, 4), (8, 6), (3, 15)), "height": 6, "width": 7}


class TestFlux2(ParityTests):
    """dev: with guidance."""

    cases = Cases(
        "flux2",
        {
            "text to image": {},
            "odd sizes": {"height": 17, "width": 15, "length": 33},
            "batch of 3": {"batch": 3, "height": 4, "width": 6, "length": 1},
            "no guidance": {"batch": 2, "height": 8, "width": 8, "without": ("guidance",)},
            "references by index": REFERENCES,
            "references by index, named": REFERENCES | {"ref_latents_method": "index", "batch": 2},
            "references on a plane": REFERENCES | {"ref_latents_method": "offset"},
            "references below": REFERENCES | {"ref_latents_method": "uxo"},
            "ten references": {"references": ((4, 3),) * 10, "height": 5, "width": 4},
            "mask": {"mask": (1, 84, 84), "height": 8, "width": 8},
            "mask per item": {"mask": (2, 84, 84), "height": 8, "width": 8, "batch": 2},
            "ControlNet": {
                "residuals": {"input": (64, None), "output": (None, 64)},
                "height": 8,
                "width": 8,
            },
            "rope options": {
                "transformer_options": {"rope_options": ROPE} | REFERENCES_MOVE,
                "references": ((9, 8),),
            },
        },
        elsewhere=("odd sizes", "references by index", "ControlNet"),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux2", tmp_path_factory.mktemp("flux2") / "tiny.safetensors")


def test_inputs_may_change_between_steps(checkpoint: Path, remote: Remote) -> None:
    first = make_inputs(SIZES, references=((9, 8),), residuals={"input": (64, None)})
    changes: list[dict[str, Any]] = [
        {},
        {"context": torch.ones(1, 21, SIZES.context_dim)},
        {"guidance": torch.ones(1)},
        {"ref_latents": [torch.ones(1, 128, 4, 4)]},
        {"ref_latents_method": "uxo"},
        {},
    ]
    for change in changes:
        assert_equal_to_native(checkpoint, remote, 2, first | change)


def test_klein_has_no_use_for_guidance(tmp_path: Path, remote: Remote) -> None:
    path = write_tiny("flux2", tmp_path / "klein.safetensors", guidance=False)
    inputs = make_inputs(SIZES)
    assert_equal_to_native(path, remote, 2, inputs)
    guided = remote(path, 2).evaluate(inputs)
    without = make_inputs(SIZES, without=("guidance",))
    assert torch.equal(guided, remote(path, 2).evaluate(without))


def test_todays_names_of_the_norms(checkpoint: Path, tmp_path: Path, remote: Remote) -> None:
    renamed = write_tiny("flux2", tmp_path / "renamed.safetensors", norm_name="weight")
    inputs = make_inputs(SIZES)
    found = remote(renamed, 2).evaluate(inputs)
    assert relative_error(found, native(checkpoint, inputs)) <= FP32_TOLERANCE


NEWER = CASES["flux2"]


@pytest.mark.rotates(5)
@pytest.mark.parametrize(("tp_size", "case"), [(size, case) for size in (2, 5) for case in NEWER])
def test_newer_comfyui(tmp_path: Path, remote: Remote, tp_size: int, case: str) -> None:
    """What ComfyUI 0.3.75's class does not know, against what a newer one computed."""
    path = write_tiny("flux2", tmp_path / "tiny.safetensors", **NEWER[case][0])
    found = remote(path, tp_size).evaluate(inputs_of("flux2", case, torch.float32))
    assert relative_error(found, expected("flux2", case, torch.float32)) <= FP32_TOLERANCE


def test_sizes(checkpoint: Path) -> None:
    info = inspect_checkpoint(str(checkpoint))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 6, 8)
    with pytest.raises(SizeError, match="num_heads=24 would have to be padded to 28"):
        info.check_tp_size(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "128"),
        ({"context": torch.zeros(1, 20, 65)}, "width 64"),
        ({"context": torch.zeros(2, 20, 64)}, "as many captions"),
        ({"ref_latents": [torch.zeros(1, 16, 8, 8)]}, "Reference latents"),
        (
            {
                "ref_latents": [torch.zeros(1, 128, 8, 8)],
                "ref_latents_method": "behind",
            },
            "'behind'",
        ),
        ({"attention_mask": torch.zeros(1, 20, 20)}, "84 tokens"),
        ({"control": {"input": [torch.zeros(1, 64, SIZES.dim + 1)]}}, "ControlNet"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Path, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs(SIZES, height=8, width=8)
    with pytest.raises(InputError, match=words):
        remote(checkpoint, 2).evaluate(inputs | change)
    assert_equal_to_native(checkpoint, remote, 2, inputs)
