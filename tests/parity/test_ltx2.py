"""LTX-2 on real ranks against ComfyUI's own LTXAVModel, on the same tiny files (stored results)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.ltx2_inputs import make_ltx2_inputs
from support.newer_references import (
    CAPTIONS,
    CASES,
    IN_BF16,
    KEPT_TOKENS,
    caption_of,
    expected,
    expected_caption,
    inputs_of,
)
from support.tiny_models import tiny, tiny_shapes, write, write_tiny
from tp_runtime.client import CheckpointError, InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

PADDED = 3  # ranks, of 8 heads: 9
EVERYWHERE = ("2.5", "2.0", "a part of both", "a guide with a mask", "a voice")
EVERYWHERE += ("a voice without sound",)
SIZED = [*((2, case) for case in CASES["ltx2"])]
SIZED += [(size, case) for size in (1, PADDED, 4) for case in EVERYWHERE]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`file(case)`: the tiny file of a case."""
    folder = tmp_path_factory.mktemp("ltx2")

    def written(case: str) -> Path:
        changes = CASES["ltx2"][case][0]
        path = folder / f"{abs(hash(str(sorted(changes.items()))))}.safetensors"
        return path if path.exists() else write_tiny("ltx2", path, **changes)

    return written


@pytest.mark.rotates(5)
@pytest.mark.parametrize(("tp_size", "case"), SIZED)
def test_fp32(file: Any, remote: Remote, tp_size: int, case: str) -> None:
    found = remote(file(case), tp_size).evaluate(inputs_of("ltx2", case, torch.float32))
    assert relative_error(found, expected("ltx2", case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.parametrize("case", ["a part of both", "parts of the second item"])
def test_batch_groups(file: Any, remote: Remote, case: str) -> None:
    """ComfyUI decides by the first item, and by the latest time, of the whole batch."""
    model = remote(file(case), 1, batch_groups=2)
    found = model.evaluate(inputs_of("ltx2", case, torch.float32))
    assert relative_error(found, expected("ltx2", case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.rotates(5)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_is_as_close_as_comfyui(file: Any, remote: Remote, tp_size: int) -> None:
    ours = theirs = 0.0
    for case in IN_BF16["ltx2"]:
        comfy = expected("ltx2", case, torch.bfloat16)
        inputs = inputs_of("ltx2", case, torch.bfloat16)
        found = remote(file(case), tp_size, torch.bfloat16).evaluate(inputs)
        assert all(one.dtype == torch.bfloat16 for one in found)
        exact = expected("ltx2", case, torch.float32)
        for one, of_comfy, of_fp32 in zip(found, comfy, exact, strict=True):
            ours += relative_error(one, of_comfy) ** 2
            theirs += relative_error(of_comfy, of_fp32) ** 2
    assert ours <= theirs


@pytest.mark.rotates(3)
@pytest.mark.parametrize("case", CAPTIONS["ltx2"])
def test_captions_are_made_ready(file: Any, remote: Remote, case: str) -> None:
    """By the connectors, which are split like the blocks."""
    caption = caption_of("ltx2", case)
    model = remote(file(case), PADDED if case == "2.5" else 2)
    found = model.connected(caption, unprocessed=True)
    error = relative_error(found[:, ::KEPT_TOKENS], expected_caption("ltx2", case))
    assert error <= FP32_TOLERANCE
    assert model.connected(found, unprocessed=False) is found


def test_inputs_may_change_between_steps(file: Any, remote: Remote) -> None:
    """Nothing that a generation had is left to the next."""
    model = remote(file("2.5"), 2)
    for case in (
        *("a guide with a mask", "a window without guides", "2.5", "a voice"),
        *("a voice without sound", "a part of both", "2.5"),
    ):
        found = model.evaluate(inputs_of("ltx2", case, torch.float32))
        assert relative_error(found, expected("ltx2", case, torch.float32)) <= FP32_TOLERANCE


def test_blocks_left_out(file: Any, remote: Remote) -> None:
    """Each, and all of them: what is left are the first and the last layer."""
    model, inputs = remote(file("2.5"), 2), inputs_of("ltx2", "2.5", torch.float32)
    results = []
    for blocks in ([], [0], [1], [0, 1]):
        options = {"skip_blocks": {"double_block": blocks}} if blocks else {}
        results.append(model.evaluate(inputs | {"transformer_options": options})[0])
    assert all(
        relative_error(one, other) > 0.01
        for index, one in enumerate(results)
        for other in results[:index]
    )


def test_sizes(file: Any) -> None:
    info = inspect_checkpoint(str(file("2.5")))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 8)
    with pytest.raises(SizeError, match="num_heads=8 would have to be padded to 10"):
        info.check_tp_size(5)
    for case in ("2.5", "2.3", "2.0", "other rotary embedding"):
        assert inspect_checkpoint(str(file(case))).sizes == tiny("ltx2", **CASES["ltx2"][case][0])


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "does not tell the setting rope_type"),
        ({"num_attention_heads": 8}, "does not tell the setting rope_type"),
        ({"rope_type": "split", "num_attention_heads": "many"}, "metadata that do not fit"),
        ({"rope_type": "split", "num_attention_heads": 4}, "of another shape"),
    ],
)
def test_metadata_that_do_not_fit(tmp_path: Path, metadata: Any, words: str) -> None:
    path = write(tmp_path / "file.safetensors", tiny_shapes("ltx2", num_blocks=1), told=metadata)
    with pytest.raises(CheckpointError, match=words):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": [torch.zeros(1, 16, 3, 2, 3)]}, "128, frames, height, width"),
        ({"x": [torch.zeros(1, 128, 3, 2, 3), torch.zeros(1, 8, 5, 32)]}, "bins 16"),
        ({"x": [torch.zeros(1, 128, 3, 2, 3)] + 2 * [torch.zeros(1, 8, 5, 16)]}, "3 of them"),
        ({"x": [torch.zeros(1, 128, 3, 2, 3), torch.zeros(2, 8, 5, 16)]}, "as many latents of"),
        ({"context": torch.zeros(1, 9, 96)}, "width 192"),
        ({"timesteps": torch.zeros(1, 17, 1)}, "18 tokens has as many timesteps"),
        ({"a_timestep": torch.zeros(1, 6, 1)}, "sound frames 5"),
        ({"denoise_mask": torch.ones(1, 1, 2, 2, 3)}, "Masks of the video"),
        ({"keyframe_idxs": torch.zeros(1, 3, 6, 2)}, "need the mask"),
        (
            {
                "keyframe_idxs": torch.zeros(1, 3, 7, 2),
                "denoise_mask": torch.ones(1, 1, 3, 2, 3),
            },
            "whole frames of 6 tokens",
        ),
        (
            {
                "keyframe_idxs": torch.zeros(1, 3, 6, 2),
                "denoise_mask": torch.ones(1, 1, 3, 2, 3),
                "guide_attention_entries": [{"strength": 0.5}],
            },
            "LTXVAddGuide",
        ),
        (
            {
                "keyframe_idxs": torch.zeros(1, 3, 6, 2),
                "denoise_mask": torch.ones(1, 1, 3, 2, 3),
                "guide_attention_entries": [{"strength": 0.5, "pre_filter_count": 12}],
            },
            "6 tokens, but 12",
        ),
        (
            {
                "generated_keyframes": {
                    "tokens_per_frame": 7,
                    "first_latent_frame": 0,
                    "num_keyframes": 1,
                }
            },
            "frames of 7 tokens",
        ),
        (
            {"ref_audio": {"tokens": torch.zeros(1, 3, 96)}},
            r"\(batch, tokens, 128\); got \(1, 3, 96",
        ),
        ({"ref_audio": torch.zeros(1, 3, 128)}, "LTXVReferenceAudio"),
        ({"frame_rate": 0}, "frame rate of LTX-2 must be a number above 0; got 0"),
        ({"transformer_options": {"stg_self_attn_blocks": 3}}, "Perturbed blocks .* got 3"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    file: Any, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs, model = make_ltx2_inputs(tiny("ltx2")), remote(file("2.5"), 2)
    with pytest.raises(InputError, match=words):
        model.evaluate(inputs | change)
    found = model.evaluate(inputs)
    assert relative_error(found, expected("ltx2", "2.5", torch.float32)) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("changes", "width", "words"),
    [({}, 96, "width 192; got 96"), ({"connector_blocks": 0}, 192, "has no connectors")],
)
def test_captions_that_do_not_fit_are_refused(
    tmp_path: Path, remote: Remote, changes: dict[str, Any], width: int, words: str
) -> None:
    model = remote(write_tiny("ltx2", tmp_path / "tiny.safetensors", **changes), 2)
    with pytest.raises(InputError, match=words):
        model.connected(torch.zeros(1, 9, width), unprocessed=True)
