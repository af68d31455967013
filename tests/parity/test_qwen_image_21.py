"""Qwen-Image-2.1 on real ranks against what ComfyUI's own class computed on the same tiny files.

No release that CI tests has the class: `support.newer_references` holds its results.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.inputs import make_inputs
from support.newer import is_known
from support.newer_references import CASES, STORED_AS, expected, inputs_of, write_case
from support.pack import pack_module
from support.tiny_models import tiny
from tp_runtime.client import CheckpointError, InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

FAMILY = "qwen_image_21"
EACH = CASES[FAMILY]
PLAIN = [case for case, (changes, _) in EACH.items() if STORED_AS not in changes]
ROUNDED = "times that bf16 rounds"
ELSEWHERE = ("odd sizes, gate and up apart", "references in the text")
SIZED = [*((2, case) for case in PLAIN), *((n, case) for n in (1, 3, 4, 5) for case in ELSEWHERE)]
# Format → the same inputs without it.
QUANTISED = {
    "int8_convrot": "references in the text",
    "int8_convrot, gate and up apart": "references in the text, gate and up apart",
    "fp8": "references in the text",
}

Written = Callable[..., Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The tiny file with these changes of its sizes."""
    folder = tmp_path_factory.mktemp(FAMILY)

    def write(**changes: Any) -> Path:
        path = folder / f"{'-'.join(map(str, changes.values())) or 'tiny'}.safetensors"
        return path if path.is_file() else write_case(FAMILY, path, changes)

    return write


@pytest.mark.rotates(5)
@pytest.mark.parametrize(("tp_size", "case"), SIZED)
def test_fp32(written: Written, remote: Remote, tp_size: int, case: str) -> None:
    found = remote(written(**EACH[case][0]), tp_size).evaluate(
        inputs_of(FAMILY, case, torch.float32)
    )
    assert relative_error(found, expected(FAMILY, case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.rotates(3)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_is_as_close_as_comfyui(written: Written, remote: Remote, tp_size: int) -> None:
    """Over all cases in which bf16 does not change the time."""
    ours = theirs = 0.0
    for case in PLAIN:
        if case == ROUNDED:
            continue
        model = remote(written(**EACH[case][0]), tp_size, torch.bfloat16)
        comfy = expected(FAMILY, case, torch.bfloat16)
        found = model.evaluate(inputs_of(FAMILY, case, torch.bfloat16))
        ours += relative_error(found, comfy) ** 2
        theirs += relative_error(comfy, expected(FAMILY, case, torch.float32)) ** 2
    assert ours <= theirs


@pytest.mark.rotates(5)
@pytest.mark.parametrize(
    ("tp_size", "case"), [(n, case) for n in (1, 2, 4, 5) for case in QUANTISED]
)
def test_quantised(written: Written, remote: Remote, tp_size: int, case: str) -> None:
    """fp8 is equal to ComfyUI's; int8 is no further from the plain model than ComfyUI's."""
    found = remote(written(**EACH[case][0]), tp_size).evaluate(
        inputs_of(FAMILY, case, torch.float32)
    )
    comfy = expected(FAMILY, case, torch.float32)
    exact = expected(FAMILY, QUANTISED[case], torch.float32)
    apart, ours, theirs = (
        relative_error(*both) for both in ((found, comfy), (found, exact), (comfy, exact))
    )
    print(f"{case} on {tp_size}: {apart:.1e} from ComfyUI's, {ours:.4f} from plain ({theirs:.4f})")
    assert 1e-3 < theirs < 0.5
    if case == "fp8":
        assert apart <= FP32_TOLERANCE
    else:
        assert ours <= 1.05 * theirs
        assert apart <= (0.35 if tp_size == 1 else 1.4) * theirs


def test_the_time_is_rounded_as_comfyui_does(written: Written, remote: Remote) -> None:
    """The model was trained so: a time that is not rounded is an error ten times that of bf16."""
    inputs = inputs_of(FAMILY, ROUNDED, torch.bfloat16)
    found = remote(written(), 2, torch.bfloat16).evaluate(inputs)
    comfy = expected(FAMILY, ROUNDED, torch.bfloat16)
    rounding = relative_error(comfy, expected(FAMILY, ROUNDED, torch.float32))
    assert relative_error(found, comfy) < 0.3 * rounding


def test_inputs_may_change_between_steps(written: Written, remote: Remote) -> None:
    """What is remembered of a prompt is taken for no other."""
    model, case = remote(written(), 2), "references in the text"
    first, exact = (inputs_of(FAMILY, case, torch.float32) for _ in range(2))
    changes: list[dict[str, Any]] = [
        {"context": first["context"] + 1},
        {"ref_latents": [x + 1 for x in first["ref_latents"]]},
        {"image_slots": [3, 4, 11]},
        {"ref_latents": first["ref_latents"][:1]},
        {"x": first["x"][..., 1:]},
    ]
    results = [model.evaluate(first)]
    for change in changes:
        results += [model.evaluate(first | change), model.evaluate(first)]
        assert torch.equal(results[-1], results[0])
        if results[-2].shape == results[0].shape:
            assert relative_error(results[-2], results[0]) > 1e-3
    later = model.evaluate(first | {"timesteps": torch.tensor([0.25])})
    assert relative_error(later, results[0]) > 1e-3
    assert relative_error(model.evaluate(exact), expected(FAMILY, case, torch.float32)) < 2e-6


def test_skipped_blocks(written: Written, remote: Remote) -> None:
    """A file without the middle block computes what one does that leaves it out."""
    inputs = inputs_of(FAMILY, "references in the text", torch.float32)
    whole, skip = remote(written(), 2), {"skip_blocks": {"single_block": [1]}}
    found = whole.evaluate(inputs | {"transformer_options": skip})
    assert relative_error(found, whole.evaluate(inputs)) > 1e-3
    assert relative_error(found, remote(_without_block(written(), 1), 2).evaluate(inputs)) < 2e-6
    nothing = {"skip_blocks": {"single_block": [0, 1, 2]}}
    assert whole.evaluate(inputs | {"transformer_options": nothing}).isfinite().all()


def _without_block(path: Path, number: int) -> Path:
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(path).items():
        parts = name.split(".")
        if parts[0] == "transformer_blocks":
            if int(parts[1]) == number:
                continue
            parts[1] = str(int(parts[1]) - (int(parts[1]) > number))
        tensors[".".join(parts)] = tensor
    save_file(tensors, path.with_name("without.safetensors"))
    return path.with_name("without.safetensors")


def test_sizes(written: Written) -> None:
    info = inspect_checkpoint(str(written()))
    assert info.label == "Qwen-Image-2.1"
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 6, 8)
    with pytest.raises(SizeError, match="num_heads=24 would have to be padded to 28"):
        info.check_tp_size(7)


@pytest.mark.skipif(is_known(FAMILY), reason="this ComfyUI has a class for it")
def test_a_comfyui_without_the_class_is_told_which_has_it(written: Written) -> None:
    info = inspect_checkpoint(str(written()))
    with (
        pack_module("nodes.skeleton") as skeleton,
        pytest.raises(CheckpointError, match=r"is a Qwen-Image-2.1 file .*Update ComfyUI: 0.37"),
    ):
        skeleton.build_skeleton(info, None)


LATENT = torch.zeros(1, 64, 4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "64-channel latents"),
        ({"context": torch.zeros(1, 20, 65)}, "width 64.*text encoder"),
        ({"context": torch.zeros(2, 20, 64)}, "as many captions"),
        ({"ref_latents": [torch.zeros(1, 16, 8, 8)]}, "Reference latents"),
        ({"ref_latents": [LATENT] * 17}, "up to 16 reference latents; got 17"),
        ({"ref_latents": [LATENT], "image_slots": [21]}, r"from 0 to 20.*got \[21\]"),
        ({"ref_latents": [LATENT] * 2, "image_slots": [5, 4]}, r"ascending.*got \[5, 4\]"),
        ({"ref_latents": [LATENT], "image_slots": ["5"]}, r"got \['5'\]"),
        ({"ref_latents": [LATENT], "image_slots": -1}, "image_slots.*got -1"),
        ({"control": {"input": [torch.zeros(1, 64, 384)]}}, "input control"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    written: Written, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs(tiny(FAMILY), height=8, width=8)
    with pytest.raises(InputError, match=words):
        remote(written(), 2).evaluate(inputs | change)
    assert remote(written(), 2).evaluate(inputs).isfinite().all()
