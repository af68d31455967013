"""Wan on real ranks against ComfyUI's own WanModel, on the same tiny files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import Remote
from parity.suite import Cases, ParityTests, assert_equal_to_native

from support.inputs import make_inputs
from support.tiny_models import tiny, tiny_shapes, write, write_tiny
from tp_runtime.client import CheckpointError, InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

ROPE = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 3.0}
VIDEO = {"frames": 3, "height": 6, "width": 8, "time_scale": 1000.0}
# 20 heads: 21 on three ranks.
SIZES = (1, 3, 4)


class TestTextToVideo(ParityTests):
    """2.1 and 2.2, 14B and 1.3B."""

    cases = Cases(
        "wan",
        {
            "video": VIDEO,
            "one frame": VIDEO | {"frames": 1},
            "33 frames": VIDEO | {"frames": 9, "length": 512},
            "odd sizes": VIDEO | {"height": 7, "width": 5, "length": 33},
            "batch of 3": VIDEO | {"batch": 3, "length": 1},
            "timesteps of frames": VIDEO | {"times_per_item": 3, "batch": 2},
            "timesteps that do not divide": VIDEO | {"times_per_item": 5},
            "more frames": VIDEO | {"lengths": {"more frames": 2}},
            "rope options": VIDEO | {"transformer_options": {"rope_options": ROPE}},
        },
        elsewhere=("video", "odd sizes", "timesteps of frames"),
        other_sizes=SIZES,
    )


class TestImageToVideo(ParityTests):
    """2.1's: with CLIP's features; those of the first and last frame have positions."""

    cases = Cases(
        "wan",
        {
            "video": VIDEO,
            "odd sizes": VIDEO | {"height": 7, "width": 5, "batch": 2},
            "no features": VIDEO | {"without": ("clip_fea",)},
            "two pictures": VIDEO | {"lengths": {"patches": 514}},
        },
        elsewhere=("odd sizes",),
        other_sizes=SIZES,
        changes={"in_channels": 36, "image_dim": 1280},
    )


class TestFirstAndLastFrame(ParityTests):
    """2.1's: CLIP's features have positions."""

    cases = Cases(
        "wan",
        {
            "both": VIDEO | {"lengths": {"patches": 514}},
            "the first": VIDEO | {"lengths": {"patches": 257}},
        },
        elsewhere=("both",),
        other_sizes=(3,),
        changes={"in_channels": 36, "image_dim": 1280, "image_positions": 514},
    )


class TestFunControl(ParityTests):
    """Fun Control: a picture before the first frame."""

    cases = Cases(
        "wan",
        {
            "picture": VIDEO | {"lengths": {"rows": 6, "columns": 8}},
            "no picture": VIDEO,
            "timesteps of frames": VIDEO
            | {"lengths": {"rows": 6, "columns": 8}, "times_per_item": 3},
        },
        elsewhere=("picture",),
        other_sizes=(3,),
        changes={"in_channels": 48, "reference_channels": 16},
    )


class TestFiveBillion(ParityTests):
    """2.2's 5B: 48 channels."""

    cases = Cases(
        "wan",
        {"video": VIDEO, "timesteps of frames": VIDEO | {"times_per_item": 3}},
        elsewhere=("timesteps of frames",),
        other_sizes=(3,),
        changes={"in_channels": 48, "out_channels": 48},
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("wan", tmp_path_factory.mktemp("wan") / "tiny.safetensors")


def test_inputs_may_change_between_steps(checkpoint: Path, remote: Remote) -> None:
    first = make_inputs(tiny("wan"), **VIDEO)
    changes: list[dict[str, Any]] = [
        {},
        {"context": torch.ones(1, 21, 64)},
        {"time_dim_concat": torch.ones(1, 16, 1, 6, 8)},
        {"transformer_options": {"rope_options": ROPE}},
        {},
    ]
    for change in changes:
        assert_equal_to_native(checkpoint, remote, 2, first | change)


def test_sizes(checkpoint: Path) -> None:
    info = inspect_checkpoint(str(checkpoint))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 7)
    with pytest.raises(SizeError, match="num_heads=20 would have to be padded to 24"):
        info.check_tp_size(6)


@pytest.mark.parametrize(
    ("tensor", "variant"),
    [("vace_patch_embedding.weight", "Wan VACE"), ("patch_embedding_pose.weight", "SCAIL")],
)
def test_variants_are_refused_by_name(tmp_path: Path, tensor: str, variant: str) -> None:
    shapes = tiny_shapes("wan", num_blocks=1)
    path = write(tmp_path / "variant.safetensors", shapes | {tensor: (320, 96, 1, 2, 2)})
    with pytest.raises(CheckpointError, match=variant):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "16, frames, height, width"),
        ({"x": torch.zeros(1, 48, 2, 8, 8)}, "16, frames, height, width"),
        ({"context": torch.zeros(1, 20, 65)}, "width 64"),
        ({"timesteps": torch.zeros(2)}, "as many timesteps"),
        ({"timesteps": torch.zeros(1, 1, 1)}, r"\(batch,\) or \(batch, times\)"),
        ({"time_dim_concat": torch.zeros(1, 16, 1, 6, 9)}, "Latents of more frames"),
        ({"vace_context": torch.zeros(1)}, "vace_context"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Path, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs(tiny("wan"), **VIDEO)
    with pytest.raises(InputError, match=words):
        remote(checkpoint, 2).evaluate(inputs | change)
    assert_equal_to_native(checkpoint, remote, 2, inputs)
