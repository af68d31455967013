"""Z-Image on real ranks against ComfyUI's own NextDiT, on the same tiny file."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.native import import_comfy, native_model
from support.pack import pack_module
from support.paths import TOY_PACK
from support.tiny_models import write_tiny
from support.toy import MODEL as TOY_MODEL
from tp_runtime.client import InputError, inspect_checkpoint

pytestmark = pytest.mark.process

TOY = TOY_PACK / "models" / "diffusion_models" / TOY_MODEL

# (batch, latent height, latent width, caption length)
CASES = [
    (1, 16, 16, 20),
    (1, 16, 16, 32),  # a caption that needs no padding
    (1, 17, 15, 33),  # odd sizes: padded circularly, then cropped
    (2, 8, 12, 1),
    (3, 9, 8, 77),
    (1, 8, 8, 1600),  # longer than diffusers' table of positions
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("z_image", tmp_path_factory.mktemp("z_image") / "tiny.safetensors")


def make_inputs(
    batch: int, height: int, width: int, length: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """What ComfyUI's BaseModel passes to the transformer, at random."""
    generator = torch.Generator().manual_seed(1000 * batch + height + length)
    return {
        "x": torch.randn(batch, 16, height, width, generator=generator).to(dtype),
        "timesteps": torch.rand(batch, generator=generator),
        "context": torch.randn(batch, length, 64, generator=generator).to(dtype),
        "num_tokens": length,
        "transformer_options": {},
    }


native_model = functools.lru_cache(maxsize=4)(native_model)


def native(path: Path, inputs: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode():
        return native_model(path, dtype)(**inputs)


@pytest.mark.rotates(5)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_fp32(checkpoint: Path, remote: Remote, tp_size: int, case: tuple[int, ...]) -> None:
    inputs = make_inputs(*case)
    found = remote(checkpoint, tp_size).evaluate(inputs)
    assert relative_error(found, native(checkpoint, inputs, torch.float32)) <= FP32_TOLERANCE


@functools.cache
def bf16_reference(path: Path, case: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """ComfyUI's result in bf16, which is slow on a CPU, and its distance from the one in fp32."""
    inputs = make_inputs(*case, dtype=torch.bfloat16)
    exact = native(
        path,
        {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()},
        torch.float32,
    )
    comfy = native(path, inputs, torch.bfloat16)
    return comfy, relative_error(comfy, exact)


@pytest.mark.rotates(5)
@pytest.mark.parametrize("case", CASES[:5:2], ids=str)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_is_as_close_as_comfyui(
    checkpoint: Path, remote: Remote, tp_size: int, case: tuple[int, ...]
) -> None:
    inputs = make_inputs(*case, dtype=torch.bfloat16)
    comfy, error = bf16_reference(checkpoint, case)
    found = remote(checkpoint, tp_size, torch.bfloat16).evaluate(inputs)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, comfy) <= error


def test_rope_options(checkpoint: Path, remote: Remote) -> None:
    options = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_y": -1.0}
    inputs = make_inputs(1, 8, 12, 20) | {"transformer_options": {"rope_options": options}}
    found = remote(checkpoint, 2).evaluate(inputs)
    assert relative_error(found, native(checkpoint, inputs, torch.float32)) <= FP32_TOLERANCE


def test_the_caption_may_change_between_steps(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 2)
    first, second = make_inputs(1, 8, 8, 20), make_inputs(1, 8, 8, 21)
    for inputs in (first, second, first):
        expected = native(checkpoint, inputs, torch.float32)
        assert relative_error(model.evaluate(inputs), expected) <= FP32_TOLERANCE


def test_a_file_with_the_prefix_of_full_checkpoints(tmp_path: Path, remote: Remote) -> None:
    plain = write_tiny("z_image", tmp_path / "plain.safetensors")
    prefixed = write_tiny("z_image", tmp_path / "full.safetensors", prefix="model.diffusion_model.")
    inputs = make_inputs(1, 8, 8, 20)
    found = remote(prefixed, 2).evaluate(inputs)
    assert relative_error(found, native(plain, inputs, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x", torch.zeros(1, 4, 8, 8), "16"),
        ("context", torch.zeros(1, 20, 65), "width 64"),
        ("timesteps", torch.zeros(2), "as many timesteps"),
        ("ref_latents", [torch.zeros(1, 16, 8, 8)], "ref_latents"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Path, remote: Remote, name: str, value: Any, words: str
) -> None:
    model = remote(checkpoint, 2)
    inputs = make_inputs(1, 8, 8, 20)
    with pytest.raises(InputError, match=words):
        model.evaluate(inputs | {name: value})
    assert torch.equal(model.evaluate(inputs), model.evaluate(inputs))


def test_blocks_that_cannot_be_left_out_are_refused(checkpoint: Path, remote: Remote) -> None:
    model, inputs = remote(checkpoint, 2), make_inputs(1, 8, 8, 20)
    options = {"skip_blocks": {"double_block": [0]}}
    with pytest.raises(InputError, match="Z-Image on the process group cannot leave blocks out"):
        model.evaluate(inputs | {"transformer_options": options})
    assert model.evaluate(inputs).isfinite().all()


def test_a_file_in_fp16_is_computed_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where 0.33 would choose fp16: it clips what overflows, which the ranks do not."""
    path = write_tiny("z_image", tmp_path / "tiny.safetensors", dtype=torch.float16)
    with pack_module("nodes.skeleton") as skeleton:
        from comfy import model_management, supported_models

        # As on a GPU, and of a file of the published width.
        offered = [torch.bfloat16, torch.float16, torch.float32]
        monkeypatch.setattr(supported_models.ZImage, "supported_inference_dtypes", offered)
        for name in ("should_use_fp16", "should_use_bf16"):
            monkeypatch.setattr(model_management, name, lambda *_args, **_options: True)
        info = inspect_checkpoint(str(path))
        chosen = skeleton.compute_dtype(skeleton.build_skeleton(info, None))
        asked_for = skeleton.compute_dtype(skeleton.build_skeleton(info, torch.float16))
    assert (chosen, asked_for) == (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def native_toy() -> Any:
    """ComfyUI's own model of the trained toy, by the class of the toy's pack."""
    import_comfy()
    import comfy.ops
    import comfy.sd
    from comfy import supported_models

    from examples.shapes.nodes import ShapesZImage

    options = {"dtype": torch.float32, "custom_operations": comfy.ops.disable_weight_init}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supported_models, "models", [ShapesZImage, *supported_models.models])
        return comfy.sd.load_diffusion_model(str(TOY), options).model.diffusion_model


@pytest.mark.rotates(5)
@pytest.mark.parametrize("timestep", [1.0, 0.5, 0.01])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_trained_toy(native_toy: Any, remote: Remote, tp_size: int, timestep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 16, 16, 16, generator=generator),
        "timesteps": torch.full((2,), timestep),
        "context": torch.randn(2, 5, 64, generator=generator),
        "num_tokens": 5,
        "transformer_options": {},
    }
    with torch.inference_mode():
        expected = native_toy(**inputs)
    found = remote(TOY, tp_size).evaluate(inputs)
    assert relative_error(found, expected) <= FP32_TOLERANCE
