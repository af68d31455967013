"""Wan on real ranks against ComfyUI's own WanModel, on the same tiny files."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from parity.suite import Cases, Fp32Tests, ParityTests, assert_equal_to_native, native
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

from support.inputs import make_inputs
from support.newer_references import CASES as OF_NEWER
from support.newer_references import expected, inputs_of
from support.tiny_models import tiny, tiny_shapes, write, write_tiny
from tp_runtime.client import CheckpointError, InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

ROPE = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 3.0}
VIDEO = {"frames": 3, "height": 6, "width": 8, "time_scale": 1000.0}
ODD = VIDEO | {"frames": 2, "height": 5, "width": 7, "length": 33}
CONTROLS = {"lengths": {"videos": 2, "control frames": 3, "rows": 6, "columns": 8}}
PATH = {"camera frames": 3, "pixel rows": 48, "pixel columns": 64}
MOVING = {"pose frames": 2, "face frames": 1}
PADDED = 3  # ranks, of 20 heads: 21


class TestTextToVideo(ParityTests):
    """2.1 and 2.2, 14B and 1.3B."""

    cases = Cases(
        "wan",
        {
            "odd sizes": ODD,
            "one frame": VIDEO | {"frames": 1, "length": 512},
            "33 frames": VIDEO | {"frames": 9, "height": 4, "width": 4},
            "batch of 3": VIDEO | {"batch": 3, "length": 1},
            "timesteps of frames": VIDEO | {"times_per_item": 3, "batch": 2},
            "timesteps that do not divide": VIDEO | {"times_per_item": 5},
            "more frames": VIDEO | {"lengths": {"more frames": 2}},
            "rope options": VIDEO | {"transformer_options": {"rope_options": ROPE}},
        },
        elsewhere=("odd sizes", "timesteps of frames"),
        other_sizes=(1, PADDED, 4),
    )

    def test_fp16_is_as_close_as_comfyui(self, checkpoint: Path, remote: Remote) -> None:
        """In which ComfyUI computes Wan on GPUs."""
        inputs = self.cases.inputs("odd sizes", torch.float16)
        comfy = native(checkpoint, inputs, torch.float16)
        exact = native(checkpoint, pytree.tree_map_only(torch.Tensor, torch.Tensor.float, inputs))
        for tp_size in (2, PADDED):
            found = remote(checkpoint, tp_size, torch.float16).evaluate(inputs)
            assert found.dtype == torch.float16
            assert relative_error(found, comfy) <= 1.5 * relative_error(comfy, exact)


class TestImageToVideo(ParityTests):
    """2.1's: with CLIP's features."""

    cases = Cases(
        "wan",
        {
            "odd sizes": ODD | {"batch": 2},
            "no features": VIDEO | {"without": ("clip_fea",)},
            "two pictures": VIDEO | {"lengths": {"patches": 514}},
        },
        elsewhere=("odd sizes",),
        other_sizes=(PADDED, 4),
        changes={"in_channels": 36, "image_dim": 1280},
    )


class TestFirstAndLastFrame(Fp32Tests):
    """2.1's: CLIP's features have positions."""

    cases = Cases(
        "wan",
        {
            "both": VIDEO | {"lengths": {"patches": 514}},
            "the first": VIDEO | {"lengths": {"patches": 257}},
        },
        elsewhere=("both",),
        other_sizes=(PADDED,),
        changes={"in_channels": 36, "image_dim": 1280, "image_positions": 514},
    )

    def test_features_without_a_position_are_refused(
        self, checkpoint: Path, remote: Remote
    ) -> None:
        inputs = self.cases.inputs("both") | {"clip_fea": torch.zeros(1, 771, 1280)}
        with pytest.raises(InputError, match=r"clip_fea.*at most 514.*got 771"):
            remote(checkpoint, 2).evaluate(inputs)


class TestFunControl(Fp32Tests):
    """Fun Control: a picture before the first frame."""

    cases = Cases(
        "wan",
        {
            "picture": VIDEO | {"lengths": {"rows": 6, "columns": 8}, "times_per_item": 3},
            "no picture": VIDEO,
        },
        elsewhere=("picture",),
        other_sizes=(PADDED,),
        changes={"in_channels": 48, "reference_channels": 16},
    )


class TestFiveBillion(Fp32Tests):
    """2.2's 5B: 48 channels, timesteps of frames."""

    cases = Cases(
        "wan",
        {"timesteps of frames": VIDEO | {"times_per_item": 3}},
        elsewhere=("timesteps of frames",),
        other_sizes=(PADDED,),
        changes={"in_channels": 48, "out_channels": 48},
    )


class TestVace(ParityTests):
    """Control videos, which go through blocks of their own."""

    cases = Cases(
        "wan",
        {
            "two videos": VIDEO | CONTROLS | {"vace_strength": [0.7, 1.2]},
            "batch of 2": VIDEO | CONTROLS | {"batch": 2, "vace_strength": [1.0, 1.0]},
        },
        elsewhere=("two videos",),
        other_sizes=(1, PADDED, 4),
        changes={"num_blocks": 4, "vace_blocks": 2, "vace_channels": 96},
    )

    @pytest.mark.rotates(5)
    @pytest.mark.parametrize("strengths", [[0.8], [0.8, 1.2]], ids=["one video", "two videos"])
    @pytest.mark.parametrize("left_out", [(0,), (1, 2), (0, 1, 2, 3)], ids=str)
    def test_blocks_left_out(
        self, checkpoint: Path, remote: Remote, left_out: tuple[int, ...], strengths: list[float]
    ) -> None:
        """What a VACE block adds is added all the same."""
        lengths = CONTROLS["lengths"] | {"videos": len(strengths)}
        inputs = make_inputs(self.cases.sizes, **VIDEO, lengths=lengths, vace_strength=strengths)
        returned = {("double_block", index): lambda given, _: given for index in left_out}
        theirs = inputs | {"transformer_options": {"patches_replace": {"dit": returned}}}
        ours = inputs | {"transformer_options": {"skip_blocks": {"double_block": [*left_out]}}}
        found = remote(checkpoint, 2).evaluate(ours)
        assert relative_error(found, native(checkpoint, theirs)) <= FP32_TOLERANCE


class TestFunCamera(Fp32Tests):
    """A camera's path."""

    cases = Cases(
        "wan",
        {
            "a path": VIDEO | {"lengths": PATH},
            "no path": VIDEO,
        },
        elsewhere=("a path",),
        other_sizes=(PADDED,),
        changes={"in_channels": 32, "image_dim": 1280, "camera_channels": 24},
    )


class TestAnimate(Fp32Tests):
    """Wan Animate: a video of poses, and one of a face, in blocks of its own.

    Pictures of faces are of 512 x 512 pixels in any model: there are few of them.
    """

    cases = Cases(
        "wan",
        {
            "poses and a face": VIDEO | {"lengths": MOVING},
            "more poses than frames": VIDEO
            | {"lengths": {"pose frames": 4}, "times_per_item": 3, "without": ("clip_fea",)},
            "one picture of a face, odd sizes": ODD
            | {"frames": 4, "batch": 2, "lengths": {"face frames": 1}},
            "more pictures than frames": VIDEO
            | {"frames": 2, "lengths": {"pose frames": 1, "face frames": 6}},
            "more frames": VIDEO | {"frames": 1, "lengths": {"more frames": 2, "pose frames": 1}},
        },
        elsewhere=("poses and a face",),
        other_sizes=(1, PADDED, 4),
        changes={"num_blocks": 10, "in_channels": 36, "image_dim": 1280, "has_faces": True},
    )

    def test_bf16_is_as_close_as_comfyui(self, checkpoint: Path, remote: Remote) -> None:
        inputs = self.cases.inputs("poses and a face", torch.bfloat16)
        comfy = native(checkpoint, inputs, torch.bfloat16)
        exact = native(checkpoint, pytree.tree_map_only(torch.Tensor, torch.Tensor.float, inputs))
        found = remote(checkpoint, 2, torch.bfloat16).evaluate(inputs)
        assert relative_error(found, comfy) <= relative_error(comfy, exact)


@pytest.mark.parametrize("where", ["", "blocks", "vace_blocks"])
def test_vace_on_a_model_of_pictures(tmp_path: Path, remote: Remote, where: str) -> None:
    """ComfyUI's class for VACE looks at no pictures; what the file has for them is left out."""
    sizes = {"num_blocks": 4, "vace_blocks": 2, "vace_channels": 96}
    plain = write_tiny("wan", tmp_path / "plain.safetensors", **sizes)
    others = load_file(
        write_tiny("wan", tmp_path / "i2v.safetensors", num_blocks=4, image_dim=1280)
    )
    own = load_file(plain)
    more = {name: tensor for name, tensor in others.items() if name not in own}
    of_blocks = {name: tensor for name, tensor in more.items() if name.startswith("blocks.")}
    more = {name: tensor for name, tensor in more.items() if name.startswith("img_emb.")}
    assert of_blocks
    assert more
    if where:
        more |= {
            f"{where}{name[6:]}": tensor for name, tensor in of_blocks.items() if name[7] in "01"
        }
    path = tmp_path / "both.safetensors"
    save_file(own | more, path)
    found = inspect_checkpoint(str(path))
    assert found.extra.keys() == more.keys()
    inputs = make_inputs(tiny("wan", **sizes), **VIDEO, **CONTROLS, vace_strength=[1.0, 0.5])
    assert torch.equal(remote(path, 2).evaluate(inputs), remote(plain, 2).evaluate(inputs))


NEWER = OF_NEWER["wan"]


@pytest.mark.rotates(5)
@pytest.mark.parametrize(
    ("tp_size", "case"), [(size, case) for size in (2, PADDED) for case in NEWER]
)
def test_newer_comfyui(tmp_path: Path, remote: Remote, tp_size: int, case: str) -> None:
    """What ComfyUI 0.3.75's class does not know, against what a newer one computed."""
    path = write_tiny("wan", tmp_path / "tiny.safetensors", **NEWER[case][0])
    found = remote(path, tp_size).evaluate(inputs_of("wan", case, torch.float32))
    assert relative_error(found, expected("wan", case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.parametrize("case", ["other videos", "SCAIL-2", "Animate 2"])
def test_newer_comfyui_in_bf16(tmp_path: Path, remote: Remote, case: str) -> None:
    """No further from ComfyUI's results in bf16 than those are from its own in fp32."""
    path = write_tiny("wan", tmp_path / "tiny.safetensors", **NEWER[case][0])
    comfy = expected("wan", case, torch.bfloat16)
    found = remote(path, 2, torch.bfloat16).evaluate(inputs_of("wan", case, torch.bfloat16))
    exact = expected("wan", case, torch.float32)
    assert relative_error(found, comfy) <= relative_error(comfy, exact)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("ref_mask_latents", (1, 28, 4, 6, 8), "each of 2 pictures and 3 of the video; got 4"),
        ("ref_mask_latents", (1, 7, 5, 6, 8), "Masks of references .*28, masked frames"),
        ("sam_latents", (1, 28, 2, 3, 4), "Masks of poses .* the size of the video"),
        ("reference_latent", (1, 16, 2, 6, 8), "Reference latents .*20, pictures"),
        ("reference_latent", (1, 20, 2, 6, 9), "here with width 8"),
    ],
)
def test_people_that_do_not_fit_are_refused(
    tmp_path: Path, remote: Remote, name: str, shape: tuple[int, ...], words: str
) -> None:
    path = write_tiny("wan", tmp_path / "tiny.safetensors", **NEWER["SCAIL-2"][0])
    inputs = inputs_of("wan", "SCAIL-2", torch.float32)
    with pytest.raises(InputError, match=words):
        remote(path, 2).evaluate(inputs | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("variant", "name", "shape", "words"),
    [
        ("Animate", "pose_latents", (1, 16, 2, 5, 8), "here with height 6"),
        ("Animate", "face_pixel_values", (1, 3, 1, 256, 256), "pixel rows 512"),
        ("Animate", "context_latents", (1, 36, 1, 6, 8), "context_latents"),
        ("Animate", "x", (1, 36, 3, 5, 8), "multiples of 16"),
        ("Animate 2", "pose_latents", (1, 16, 3, 6, 8), "but the first.*: 2; got 3"),
        ("Animate 2", "context_pose", (1, 5, 65), "Captions of poses"),
    ],
)
def test_motion_that_does_not_fit_is_refused(
    tmp_path: Path, remote: Remote, variant: str, name: str, shape: tuple[int, ...], words: str
) -> None:
    changes = TestAnimate.cases.changes if variant == "Animate" else NEWER["Animate 2"][0]
    path = write_tiny("wan", tmp_path / "tiny.safetensors", **changes)
    lengths = {"pose frames": 2}
    inputs = make_inputs(tiny("wan", **changes), **VIDEO | {"lengths": lengths})
    given = inputs | {name: torch.zeros(shape)}
    if name == "x":
        given["pose_latents"] = torch.zeros(1, 16, 2, *shape[3:])
    with pytest.raises(InputError, match=words):
        remote(path, 2).evaluate(given)


@pytest.mark.rotates(5)
@pytest.mark.parametrize("left_out", [(0,), (1, 5, 6), (0, 1, 2, 3, 4, 5)], ids=str)
def test_faces_are_looked_at_where_blocks_are_left_out(
    tmp_path: Path, remote: Remote, left_out: tuple[int, ...]
) -> None:
    cases = TestAnimate.cases
    path = write_tiny("wan", tmp_path / "tiny.safetensors", **cases.changes)
    inputs = cases.inputs("one picture of a face, odd sizes")
    returned = {("double_block", index): lambda given, _: given for index in left_out}
    theirs = inputs | {"transformer_options": {"patches_replace": {"dit": returned}}}
    ours = inputs | {"transformer_options": {"skip_blocks": {"double_block": [*left_out]}}}
    found = remote(path, 2).evaluate(ours)
    assert relative_error(found, native(path, theirs)) <= FP32_TOLERANCE


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


# What ComfyUI tells the other models of these blocks by: a tensor, or a setting in the metadata.
VARIANTS = {
    "casual_audio_encoder.encoder.final_linear.weight": "Wan S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "patch_embedding_global.weight": "WanDancer",
    "model_type=flow_rvs": "FlowRVS",
    "causal_ar=True": "causal Wan (Causal Forcing, Self Forcing)",
}


@pytest.mark.parametrize(("told", "variant"), VARIANTS.items(), ids=VARIANTS.values())
def test_variants_are_refused_by_name(tmp_path: Path, told: str, variant: str) -> None:
    shapes = tiny_shapes("wan", num_blocks=1)
    setting, _, value = told.partition("=")
    settings = {setting: value} if value else None
    tensors = {} if value else {told: (320, 96, 1, 2, 2)}
    path = write(tmp_path / "variant.safetensors", shapes | tensors, told=settings)
    with pytest.raises(CheckpointError, match=re.escape(f"This is a {variant} file")):
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
        ({"face_pixel_values": torch.zeros(1)}, "face_pixel_values"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Path, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs(tiny("wan"), **VIDEO)
    with pytest.raises(InputError, match=words):
        remote(checkpoint, 2).evaluate(inputs | change)
    assert_equal_to_native(checkpoint, remote, 2, inputs)
