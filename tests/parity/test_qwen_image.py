"""Qwen-Image on real ranks against ComfyUI's own QwenImageTransformer2DModel, on one tiny file."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from torch.utils import _pytree as pytree

from support.native import native_model
from support.tiny_models import tiny, tiny_shapes, write, write_tiny
from tp_runtime.client import CheckpointError, InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

DIM = tiny("qwen_image").dim
REFERENCES = {"references": ((9, 8), (16, 12), (6, 30)), "height": 12, "width": 15}

CASES: dict[str, dict[str, Any]] = {
    "text to image": {},
    "odd sizes": {"height": 17, "width": 15, "length": 33},
    "odd number of tokens along": {"height": 14, "width": 18},
    "batch of 3": {"batch": 3, "height": 8, "width": 12, "length": 1},
    "wide": {"height": 2, "width": 640},  # positions that bf16 rounds
    "references by index": REFERENCES,
    "references by index, named": REFERENCES | {"ref_latents_method": "index", "batch": 2},
    "references on a plane": REFERENCES | {"ref_latents_method": "offset"},
    "references of FLUX's method": REFERENCES | {"ref_latents_method": "uxo"},
    "mask": {"attention_mask": torch.zeros(1, 20)},
    "ControlNet": {"control": (64, None, 64)},
    "ControlNet for fewer blocks and tokens": {"control": (64, 30), "batch": 2},
    "ControlNet with references": {"control": (64, 30), **REFERENCES},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen_image", tmp_path_factory.mktemp("qwen_image") / "tiny.safetensors")


def make_inputs(
    *,
    batch: int = 1,
    height: int = 16,
    width: int = 16,
    length: int = 20,
    references: tuple[tuple[int, int], ...] = (),
    control: tuple[int | None, ...] = (),
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> dict[str, Any]:
    """What ComfyUI's BaseModel passes to the transformer, at random.

    `control`: lengths of a ControlNet's residuals.
    """
    generator = torch.Generator().manual_seed(1000 * batch + height + length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs: dict[str, Any] = {
        "x": random(batch, 16, 1, height, width),
        "timesteps": torch.rand(batch, generator=generator),
        "context": random(batch, length, 64),
        "transformer_options": {},
    }
    if references:
        inputs["ref_latents"] = [random(batch, 16, 1, *size) for size in references]
    if control:
        residuals = [None if n is None else random(batch, n, DIM) for n in control]
        inputs["control"] = {"middle": [], "input": residuals, "output": []}
    return inputs | others


native_model = functools.lru_cache(maxsize=4)(native_model)


def native(path: Path, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    # ComfyUI writes into the options.
    named = inputs | {"transformer_options": dict(inputs["transformer_options"])}
    with torch.inference_mode():
        return native_model(path, dtype)(named.pop("x"), named.pop("timesteps"), **named)


def in_fp32(inputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.float, inputs)


def assert_equal_to_native(path: Path, remote: Remote, tp_size: int, inputs: Any) -> None:
    found = remote(path, tp_size).evaluate(inputs)
    assert relative_error(found, native(path, inputs)) <= FP32_TOLERANCE


@pytest.mark.rotates(3)
@pytest.mark.parametrize("case", CASES)
def test_fp32_on_two_ranks(checkpoint: Path, remote: Remote, case: str) -> None:
    assert_equal_to_native(checkpoint, remote, 2, make_inputs(**CASES[case]))


@pytest.mark.rotates(3)
# Five ranks: 25 heads, of which one is padding.
@pytest.mark.parametrize("case", ["odd sizes", "references on a plane", "ControlNet"])
@pytest.mark.parametrize("tp_size", [1, 4, 5])
def test_fp32(checkpoint: Path, remote: Remote, tp_size: int, case: str) -> None:
    assert_equal_to_native(checkpoint, remote, tp_size, make_inputs(**CASES[case]))


@functools.cache
def bf16_reference(path: Path, case: str) -> tuple[torch.Tensor, float]:
    """ComfyUI's result in bf16, which is slow on a CPU, and its distance from the one in fp32."""
    inputs = make_inputs(**CASES[case], dtype=torch.bfloat16)
    comfy = native(path, inputs, torch.bfloat16)
    return comfy, relative_error(comfy, native(path, in_fp32(inputs)))


@pytest.mark.rotates(3)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_is_as_close_as_comfyui(checkpoint: Path, remote: Remote, tp_size: int) -> None:
    """Over all cases: a single one differs by a few percent, since errors this small are noise."""
    ours = theirs = 0.0
    for name, case in CASES.items():
        inputs = make_inputs(**case, dtype=torch.bfloat16)
        comfy, error = bf16_reference(checkpoint, name)
        found = remote(checkpoint, tp_size, torch.bfloat16).evaluate(inputs)
        assert found.dtype == torch.bfloat16
        ours += relative_error(found, comfy) ** 2
        theirs += error**2
    assert ours <= theirs


def test_inputs_may_change_between_steps(checkpoint: Path, remote: Remote) -> None:
    first = make_inputs(references=((9, 8),), control=(64, None))
    changes: list[dict[str, Any]] = [
        {},
        {"context": torch.ones(1, 21, 64)},
        {"ref_latents": [torch.ones(1, 16, 1, 4, 4)]},
        {"ref_latents_method": "offset"},
        {"control": {"input": [None, None, torch.ones(1, 64, DIM)]}},
        {},
    ]
    for change in changes:
        assert_equal_to_native(checkpoint, remote, 2, first | change)


def test_negative_index_puts_references_before_the_image(checkpoint: Path, remote: Remote) -> None:
    """ComfyUI 0.3.75 does not know it: compared with what index gives."""
    inputs = make_inputs(**REFERENCES)
    model = remote(checkpoint, 2)
    behind = model.evaluate(inputs)
    before = model.evaluate(inputs | {"ref_latents_method": "negative_index"})
    assert relative_error(before, behind) > 1e-3


def test_sizes(checkpoint: Path) -> None:
    info = inspect_checkpoint(str(checkpoint))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 6, 8)
    with pytest.raises(SizeError, match="num_heads=24 would have to be padded to 28"):
        info.check_tp_size(7)


@pytest.mark.parametrize(
    ("tensor", "variant"),
    [
        ("__index_timestep_zero__", "Qwen-Image-Edit-2511"),
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
    ],
)
def test_variants_are_refused_by_name(tmp_path: Path, tensor: str, variant: str) -> None:
    shapes = tiny_shapes("qwen_image", num_blocks=1)
    path = write(tmp_path / "variant.safetensors", shapes | {tensor: (2, DIM)})
    with pytest.raises(CheckpointError, match=variant):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "16, 1, height, width"),
        ({"x": torch.zeros(1, 16, 2, 8, 8)}, "16, 1, height, width"),
        ({"context": torch.zeros(1, 20, 65)}, "width 64"),
        ({"context": torch.zeros(2, 20, 64)}, "as many captions"),
        ({"ref_latents": [torch.zeros(1, 16, 8, 8)]}, "Reference latents"),
        (
            {
                "ref_latents": [torch.zeros(1, 16, 1, 8, 8)],
                "ref_latents_method": "index_timestep_zero",
            },
            "'index_timestep_zero'",
        ),
        ({"control": {"input": [torch.zeros(1, 64, DIM + 1)]}}, "ControlNet"),
        ({"additional_t_cond": torch.zeros(1)}, "additional_t_cond"),
        ({"guidance": torch.zeros(1)}, "guidance"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Path, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs()
    with pytest.raises(InputError, match=words):
        remote(checkpoint, 2).evaluate(inputs | change)
    assert_equal_to_native(checkpoint, remote, 2, inputs)
