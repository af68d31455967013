"""MiniMax H3 on real ranks against what ComfyUI 0.33's own class computed on the same files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from safetensors.torch import load_file, save_file

from support.inputs import make_inputs
from support.minimax_payloads import CASES, VIDEO, keyframe, payload, picture, random
from support.newer_references import expected, inputs_of
from support.tiny_models import tiny, tiny_shapes, write, write_tiny
from tp_runtime.client import CheckpointError, InputError, inspect_checkpoint

pytestmark = pytest.mark.process

Variants = Callable[[Mapping[str, Any]], Path]
PADDED = 3  # ranks, of 8 heads: 9
SIZED = [(2, case) for case in CASES]
SIZED += [(size, case) for size in (1, PADDED, 4) for case in ("odd sizes", "references", "masks")]
SIZED += [(PADDED, "full file, references and masks")]
SIZED += [(size, "heads of the published model") for size in (3, 5, 7, 8)]  # 56, padded to 57, 60


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    """The tiny file of a pruned model, with changes of its sizes."""
    folder = tmp_path_factory.mktemp("minimax_h3")

    def written(changes: Mapping[str, Any]) -> Path:
        path = folder / f"{'-'.join(changes) or 'pruned'}.safetensors"
        return path if path.exists() else write_tiny("minimax_h3", path, **changes)

    return written


@pytest.mark.rotates(7)
@pytest.mark.parametrize(("tp_size", "case"), SIZED)
def test_fp32(variants: Variants, remote: Remote, tp_size: int, case: str) -> None:
    inputs = inputs_of("minimax_h3", case, torch.float32)
    found = remote(variants(CASES[case][0]), tp_size).evaluate(inputs)
    assert relative_error(found, expected("minimax_h3", case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.rotates(3)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_is_as_close_as_comfyui(variants: Variants, remote: Remote, tp_size: int) -> None:
    """Over all cases: a single one differs by a few percent, since such errors are noise."""
    ours = theirs = 0.0
    for case, (changes, _) in CASES.items():
        model = remote(variants(changes), tp_size, torch.bfloat16)
        found = model.evaluate(inputs_of("minimax_h3", case, torch.bfloat16))
        comfy = expected("minimax_h3", case, torch.bfloat16)
        assert [one.dtype for one in found] == [torch.bfloat16, torch.bfloat16]
        ours += relative_error(found, comfy) ** 2
        theirs += relative_error(comfy, expected("minimax_h3", case, torch.float32)) ** 2
    assert ours <= theirs


def test_conditions_change_the_result(variants: Variants, remote: Remote) -> None:
    """The cases are of one text and latents, so what their payloads say must show."""
    cases = ("text", "first and last frame", "guides", "references", "masks", "shifts")
    model = remote(variants({}), 2)
    found = [model.evaluate(inputs_of("minimax_h3", case, torch.float32)) for case in cases]
    for index, one in enumerate(found):
        for other in found[:index]:
            for latents, others in zip(one, other, strict=True):
                assert relative_error(latents, others) > 1e-3


def test_asleep_between_two_steps(variants: Variants, remote: Remote) -> None:
    """Both latents of the next are what they would have been."""
    model, inputs = remote(variants({}), 2), inputs_of("minimax_h3", "masks", torch.float32)
    before = model.evaluate(inputs)
    model.sleep()
    assert sum(model.loaded_bytes()) == 0
    for one, other in zip(model.evaluate(inputs), before, strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_of_the_same_shapes_has_tables_of_the_same_shapes() -> None:
    """Whatever the timestep: a recorded evaluation serves all of a generation."""
    sizes, shapes = tiny("minimax_h3"), set()
    for case in ("masks", "first and last frame, near the end"):
        inputs = inputs_of("minimax_h3", case, torch.float32)
        masks = {name: one for name, one in inputs.items() if name.endswith("mask")}
        for timestep in (1000.0, 600.0, 0.5, 0.0):
            tables = sizes.prepared(inputs | {"timesteps": torch.tensor([timestep])})
            shapes.add((case, *(tables[name].shape for name in ("timesteps", *masks))))
            assert all(tables[name].max() < len(tables["timesteps"]) for name in masks)
    assert len(shapes) == 2


def test_sizes(variants: Variants) -> None:
    info = inspect_checkpoint(str(variants({})))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 8)
    geometry = tiny("minimax_h3").geometry
    assert geometry.latent_shape(832, 480, 124) == (24, 37, 30, 52)
    assert geometry.image_tokens((24, 37, 30, 52)) == 37 * 15 * 26 + 2 * 207
    assert [geometry.latent_shape(32, 32, n)[1] for n in (1, 5, 22, 362)] == [1, 2, 7, 107]


def test_sparse_attention_is_refused_by_name(tmp_path: Path) -> None:
    gate = {"blocks.0.attn.to_gate_compress.weight": (256, 192)}
    path = write(tmp_path / "fast.safetensors", tiny_shapes("minimax_h3") | gate)
    with pytest.raises(CheckpointError, match="FastH3"):
        inspect_checkpoint(str(path))


def test_folders_are_refused_by_name(tmp_path: Path) -> None:
    """MiniMaxAI's own among them, whose rows of q, k and v lie head by head."""
    write_tiny("minimax_h3", tmp_path / "diffusion_pytorch_model.safetensors")
    said = {"_class_name": "MiniMaxH3Transformer3DModel", "num_refiner_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="This is MiniMax H3 as a diffusers folder"):
        inspect_checkpoint(str(tmp_path))


def test_settings_that_no_shape_shows_are_refused(tmp_path: Path) -> None:
    """ComfyUI's class would compute with them."""

    def file(**settings: Any) -> str:
        said = {"config": json.dumps({"transformer": settings})}
        path = write_tiny("minimax_h3", tmp_path / "said.safetensors")
        save_file(load_file(path), path, metadata=said)
        return str(path)

    inspect_checkpoint(file(norm_eps=1e-5, patch_size=[1, 2, 2], sigma_shift_audio=4.0))
    with pytest.raises(CheckpointError, match=r"sets qk_norm_eps to 1e-06, not to 1e-05.*stock"):
        inspect_checkpoint(file(qk_norm_eps=1e-6))


_FRAME, _PICTURE = keyframe(0, 1), picture(4, 6, 3)
WRONG: list[tuple[Mapping[str, Any], str]] = [
    ({"x": [random(1, 2, 24, 3, 6, 8), random(2, 2, 32, 2, 5)]}, "2 latents need as many"),
    (
        {
            "x": [random(1, 2, 24, 3, 6, 8), random(2, 2, 32, 2, 5)],
            "timesteps": torch.ones(2),
            "context": random(3, 2, 12, 64),
        },
        "one video at a time; got a batch of 2",
    ),
    ({"x": [random(1, 1, 24, 3, 6, 8), random(2, 2, 32, 2, 5)]}, "as many audio latents; got 2"),
    ({"x": random(1, 1, 24, 3, 6, 8)}, r"a list of 2 tensors \(latents, audio latents\)"),
    ({"x": [random(1, 1, 24, 3, 6, 8)]}, "got 1 of them"),
    ({"x": [random(1, 1, 24, 3, 6, 8), random(2, 1, 32, 3, 5)]}, "sides 2"),
    ({"denoise_mask": random(1, 1, 1, 2, 6, 8)}, "frames 3"),
    ({"audio_denoise_mask": random(1, 1, 1, 2, 6)}, "samples 5"),
    ({"minimax_payload": payload([_FRAME | {"resolved_frame_index": "0"}])}, "frame_index.*'?0"),
    ({"minimax_payload": payload([_FRAME | {"resolved_frame_index": -1}])}, "number from 0"),
    ({"minimax_payload": payload([{**_FRAME, "latent": random(1, 1, 24, 1, 6, 6)}])}, "one size"),
    ({"minimax_payload": payload(refs=[_PICTURE | {"kind": "sketch"}])}, "one of image.*sketch"),
    ({"minimax_payload": payload(refs=[_PICTURE | {"latent_h": 6}])}, "cond_video_latents"),
    ({"minimax_payload": payload(refs=[picture(5, 6, 3)])}, "must be even"),
    ({"minimax_payload": payload() | {"keyframes": 3}}, "keyframes.*list"),
    ({"minimax_payload": payload(seed=2**64 - 1)}, r"below 2\*\*64"),
    ({"minimax_payload": payload(visual_cond_noise_aug="much")}, "a number; got much"),
    ({"minimax_payload": payload(text_token_tags=torch.ones(1, 12))}, "tensor of integers"),
    ({"minimax_payload": payload(text_token_tags=torch.ones(1, 5).long())}, "12 tokens"),
    ({"minimax_payload": payload(text_token_tags=3 * torch.ones(12).long())}, "0, 1 and 2"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_inputs_that_do_not_fit_are_refused(
    variants: Variants, change: Mapping[str, Any], words: str
) -> None:
    """Before anything is sent: on the ranks it would be too late."""
    inputs = make_inputs(tiny("minimax_h3"), **VIDEO)
    info = inspect_checkpoint(str(variants({})))
    info.checked_inputs(inputs, "float32")
    with pytest.raises(InputError, match=words):
        info.checked_inputs(inputs | change, "float32")
