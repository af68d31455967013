"""Krea 2 on real ranks against what ComfyUI's own SingleStreamDiT computed on the same tiny files.

ComfyUI 0.3.75 has no such class: the results are those of a newer one (`support.newer_references`).
"""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.inputs import make_inputs
from support.newer_references import CASES, expected, inputs_of
from support.pack import pack_module
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import CheckpointError, InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

SIZES, NEWER = tiny("krea2"), CASES["krea2"]
SIZED = [
    *((2, case) for case in NEWER),
    *((size, "odd sizes") for size in (1, 3, 4, 5, 8)),
    *((size, "references at time 0, batch") for size in (1, 3, 4, 5, 8)),
]

Written = Callable[..., Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`written(changes)`: a tiny file with these sizes, written once."""
    folder = tmp_path_factory.mktemp("krea2")

    def file(changes: Mapping[str, Any]) -> Path:
        path = folder / f"{'-'.join(changes) or 'tiny'}.safetensors"
        return path if path.exists() else write_tiny("krea2", path, **changes)

    return file


@pytest.mark.rotates(5)
@pytest.mark.parametrize(("tp_size", "case"), SIZED)
def test_fp32(written: Written, remote: Remote, tp_size: int, case: str) -> None:
    found = remote(written(NEWER[case][0]), tp_size).evaluate(
        inputs_of("krea2", case, torch.float32)
    )
    assert relative_error(found, expected("krea2", case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.rotates(5)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_is_as_close_as_comfyui(written: Written, remote: Remote, tp_size: int) -> None:
    """No further from ComfyUI's results in bf16 than those are from its own in fp32, over all."""
    ours = theirs = 0.0
    for case, (changes, _) in NEWER.items():
        model = remote(written(changes), tp_size, torch.bfloat16)
        comfy = expected("krea2", case, torch.bfloat16)
        found = model.evaluate(inputs_of("krea2", case, torch.bfloat16))
        assert found.dtype == torch.bfloat16
        ours += relative_error(found, comfy) ** 2
        theirs += relative_error(comfy, expected("krea2", case, torch.float32)) ** 2
    assert ours <= theirs


def test_inputs_may_change_between_steps(written: Written, remote: Remote) -> None:
    """What is remembered of a prompt is used for it alone."""
    model, first = remote(written({}), 2), inputs_of("krea2", "references by index", torch.float32)
    expected_first = expected("krea2", "references by index", torch.float32)
    changes: list[dict[str, Any]] = [
        {"context": torch.ones(1, 21, SIZES.num_text_layers * SIZES.text_dim)},
        {"ref_latents": [torch.ones(1, 16, 1, 4, 4)]},
        {"ref_latents_method": "index_timestep_zero"},
        {"ref_latents_method": None},
        {"timesteps": torch.ones(1)},
    ]
    for change in changes:
        assert relative_error(model.evaluate(first), expected_first) <= FP32_TOLERANCE
        assert relative_error(model.evaluate(first | change), expected_first) > 1e-3, change


def test_any_method_is_by_index(written: Written, remote: Remote) -> None:
    inputs = inputs_of("krea2", "any other method", torch.float32)
    found = remote(written({}), 2).evaluate(inputs)
    by_index = expected("krea2", "references by index", torch.float32)
    assert relative_error(found, by_index) <= FP32_TOLERANCE


def test_a_comfyui_without_the_class_is_told_which_has_it(written: Written) -> None:
    info = inspect_checkpoint(str(written({})))
    with pack_module("nodes.skeleton") as skeleton:
        if importlib.util.find_spec("comfy.ldm.krea2") is None:
            with pytest.raises(CheckpointError, match=r"Krea 2 file .* Update ComfyUI: 0\.33"):
                skeleton.build_skeleton(info, None)
            return
        model = skeleton.build_skeleton(info, None).diffusion_model
    assert model.state_dict().keys() == info.tensors.keys()


def test_sizes(written: Written) -> None:
    info = inspect_checkpoint(str(written({})))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 6, 8)
    with pytest.raises(SizeError, match="num_heads=24 would have to be padded to 28"):
        info.check_tp_size(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "16, 1, height, width"),
        ({"x": torch.zeros(1, 16, 2, 8, 8)}, "16, 1, height, width"),
        ({"x": torch.zeros(1, 4, 1, 8, 8)}, "16-channel latents"),
        ({"context": torch.zeros(1, 20, 80)}, "width 960.*text encoder"),
        ({"context": torch.zeros(2, 20, 960)}, "as many captions"),
        ({"ref_latents": [torch.zeros(1, 16, 8, 8)]}, "Reference latents"),
        ({"ref_latents": [torch.zeros(1, 16, 3, 8, 8)]}, "16, 1, rows, columns"),
        ({"ref_latents": [torch.zeros(2, 16, 1, 8, 8)]}, "as many reference latents"),
        ({"control": {"input": [torch.zeros(1, 64, 64)]}}, "control"),
        ({"guidance": torch.zeros(1)}, "guidance"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    written: Written, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs(SIZES, height=8, width=8)
    model = remote(written({}), 2)
    with pytest.raises(InputError, match=words):
        model.evaluate(inputs | change)
    assert model.evaluate(inputs).isfinite().all()
