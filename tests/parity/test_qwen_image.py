"""Qwen-Image on real ranks against ComfyUI's own QwenImageTransformer2DModel, on one tiny file."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from torch.utils import _pytree as pytree

from support.diffusers_folders import write_folder
from support.native import native_model
from support.newer_references import CASES as CASES_OF_NEWER
from support.newer_references import expected, inputs_of
from support.pack import pack_module
from support.tiny_models import tiny, write_tiny
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


@pytest.mark.rotates(5)
@pytest.mark.parametrize("case", CASES)
def test_fp32_on_two_ranks(checkpoint: Path, remote: Remote, case: str) -> None:
    assert_equal_to_native(checkpoint, remote, 2, make_inputs(**CASES[case]))


@pytest.mark.rotates(5)
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


@pytest.mark.rotates(5)
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
        {"control": {"input": [torch.linspace(-1, 1, 64 * DIM).view(1, 64, DIM)] * 2}},
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


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`variants(changes)`: a tiny file of the variant with these sizes, written once."""
    folder = tmp_path_factory.mktemp("variants")

    def written(changes: Mapping[str, Any]) -> Path:
        path = folder / f"{'-'.join(changes) or 'plain'}.safetensors"
        return path if path.exists() else write_tiny("qwen_image", path, **changes)

    return written


NEWER = CASES_OF_NEWER["qwen_image"]
SIZED = [
    *((2, case) for case in NEWER),
    *((size, "2511, batch") for size in (1, 4, 5)),
    *((size, "layers with a reference") for size in (1, 4, 5)),
    *((size, "references of several frames") for size in (1, 4, 5)),
]


@pytest.mark.rotates(5)
@pytest.mark.parametrize(("tp_size", "case"), SIZED)
def test_newer_comfyui(
    variants: Callable[..., Path], remote: Remote, tp_size: int, case: str
) -> None:
    """What ComfyUI 0.3.75 has no class for, against what a newer one computed on the same file."""
    inputs = inputs_of("qwen_image", case, torch.float32)
    found = remote(variants(NEWER[case][0]), tp_size).evaluate(inputs)
    assert relative_error(found, expected("qwen_image", case, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.rotates(3)
@pytest.mark.parametrize("tp_size", [2, 4])
def test_bf16_of_newer_comfyui(variants: Callable[..., Path], remote: Remote, tp_size: int) -> None:
    """No further from ComfyUI's results in bf16 than those are from its own in fp32, over all."""
    ours = theirs = 0.0
    for case, (changes, _) in NEWER.items():
        model = remote(variants(changes), tp_size, torch.bfloat16)
        comfy = expected("qwen_image", case, torch.bfloat16)
        found = model.evaluate(inputs_of("qwen_image", case, torch.bfloat16))
        ours += relative_error(found, comfy) ** 2
        theirs += relative_error(comfy, expected("qwen_image", case, torch.float32)) ** 2
    assert ours <= theirs


def test_time_zero_and_layers_change_the_result(
    variants: Callable[..., Path], remote: Remote
) -> None:
    inputs = inputs_of("qwen_image", "2511 with references", torch.float32)
    plain = remote(variants({}), 2).evaluate(inputs)
    assert relative_error(remote(variants({"zero_time": True}), 2).evaluate(inputs), plain) > 1e-3
    inputs = make_inputs()
    plain = remote(variants({}), 2).evaluate(inputs)
    assert relative_error(remote(variants({"added_time": True}), 2).evaluate(inputs), plain) > 1e-3


@pytest.mark.parametrize(
    ("changes", "variant"),
    [({"zero_time": True}, "Qwen-Image-Edit-2511"), ({"added_time": True}, "Qwen-Image-Layered")],
)
def test_a_comfyui_without_the_class_is_told_which_has_it(
    variants: Callable[..., Path], changes: dict[str, bool], variant: str
) -> None:
    info = inspect_checkpoint(str(variants(changes)))
    with pack_module("nodes.skeleton") as skeleton:
        if hasattr(
            skeleton.build_skeleton(inspect_checkpoint(str(variants({}))), None).diffusion_model,
            "default_ref_method",
        ):
            skeleton.build_skeleton(info, None)
            return
        with pytest.raises(CheckpointError, match=f"{variant} file .* Update ComfyUI: 0.33"):
            skeleton.build_skeleton(info, None)
    # Also where the page asks, before anything runs.
    with pack_module("nodes.gpu_count") as gpu_count:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=f"{variant} file .* Update ComfyUI: 0.33"):
                gpu_count.refused_counts(info.path, gpu_count.Placement())


def test_a_folder_does_not_say_that_references_are_at_time_zero(tmp_path: Path) -> None:
    file = write_tiny("qwen_image", tmp_path / "file.safetensors", num_blocks=1)
    folder = write_folder(file, tmp_path / "folder", "qwen_image")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"zero_cond_t": True}))
    with pytest.raises(CheckpointError, match="Qwen-Image-Edit-2511 as a diffusers folder"):
        inspect_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 16, 8, 8)}, "16, frames, height, width"),
        ({"context": torch.zeros(1, 20, 65)}, "width 64"),
        ({"context": torch.zeros(2, 20, 64)}, "as many captions"),
        ({"ref_latents": [torch.zeros(1, 16, 8, 8)]}, "Reference latents"),
        (
            {"ref_latents": [torch.zeros(1, 16, 1, 8, 8)], "ref_latents_method": "behind"},
            "'behind'. Supported: index, index_timestep_zero, negative_index, offset, uxo",
        ),
        ({"attention_mask": torch.ones(1, 21)}, "the captions have \\(1, 20\\)"),
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
