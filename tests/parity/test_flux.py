"""FLUX.1 on real ranks against ComfyUI's own Flux, on the same tiny file."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from parity.suite import REFERENCES_MOVE
from torch.utils import _pytree as pytree

from support.native import native_model
from support.newer_references import CASES as NEWER_CASES
from support.newer_references import expected, inputs_of
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import InputError, SizeError, inspect_checkpoint

pytestmark = pytest.mark.process

DIM = tiny("flux").dim
ROPE = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 3.0}
REFERENCES = {"references": ((9, 8), (16, 12), (6, 30)), "height": 12, "width": 15}

CASES: dict[str, dict[str, Any]] = {
    "text to image": {},
    "odd sizes": {"height": 17, "width": 15, "length": 33},
    "batch of 3": {"batch": 3, "height": 8, "width": 12, "length": 1},
    "no guidance and no y": {"batch": 2, "height": 8, "width": 8, "without": ("guidance", "y")},
    "references on a plane": REFERENCES | {"ref_latents_method": "offset"},
    "references by index": REFERENCES | {"ref_latents_method": "index", "batch": 2},
    "references below": REFERENCES | {"ref_latents_method": "uxo"},
    "one reference": {"references": ((10, 8),)},
    "mask": {"mask": (1, 84, 84)},
    "mask per item": {"mask": (2, 84, 84), "batch": 2},
    "mask without batch": {"mask": (84, 84)},
    "ControlNet": {"double": (64, None), "single": (None, 64)},
    "ControlNet for fewer blocks and tokens": {"double": (64,), "single": (30,), "batch": 2},
    "ControlNet with references": {"double": (64, 30), **REFERENCES},
    "rope options": {
        "transformer_options": {"rope_options": ROPE} | REFERENCES_MOVE,
        "references": ((9, 8),),
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux", tmp_path_factory.mktemp("flux") / "tiny.safetensors")


def make_inputs(
    *,
    batch: int = 1,
    height: int = 16,
    width: int = 16,
    length: int = 20,
    channels: int = 16,
    references: tuple[tuple[int, int], ...] = (),
    mask: tuple[int, ...] = (),
    double: tuple[int | None, ...] = (),
    single: tuple[int | None, ...] = (),
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> dict[str, Any]:
    """What ComfyUI's BaseModel passes to the transformer, at random.

    `double` and `single`: lengths of a ControlNet's residuals for those blocks.
    """
    generator = torch.Generator().manual_seed(1000 * batch + height + length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs: dict[str, Any] = {
        "x": random(batch, channels, height, width),
        "timesteps": torch.rand(batch, generator=generator),
        "context": random(batch, length, 64),
        "y": random(batch, 48),
        # BaseModel rounds it to the model's dtype; times 1000, this one is exact in bf16, too.
        "guidance": torch.full((batch,), 4.0, dtype=dtype),
        "transformer_options": {},
    }
    if references:
        inputs["ref_latents"] = [random(batch, channels, *size) for size in references]
    if mask:
        inputs["attention_mask"] = random(*mask)
    if double or single:
        stacks = {"input": double, "output": single}
        inputs["control"] = {"middle": []} | {
            name: [None if n is None else random(batch, n, DIM) for n in lengths]
            for name, lengths in stacks.items()
        }
    return {key: value for key, value in inputs.items() if key not in without} | others


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
@pytest.mark.parametrize("case", ["odd sizes", "references by index", "ControlNet"])
@pytest.mark.parametrize("tp_size", [1, 4, 5])
def test_fp32(checkpoint: Path, remote: Remote, tp_size: int, case: str) -> None:
    assert_equal_to_native(checkpoint, remote, tp_size, make_inputs(**CASES[case]))


@pytest.mark.parametrize("case", NEWER_CASES["flux"])
def test_newer_comfyui(checkpoint: Path, remote: Remote, case: str) -> None:
    """References that `rope_options` move, as 0.33 does and 0.3.75 does not."""
    found = remote(checkpoint, 2).evaluate(inputs_of("flux", case, torch.float32))
    assert relative_error(found, expected("flux", case, torch.float32)) <= FP32_TOLERANCE


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
    first = make_inputs(references=((9, 8),), double=(64, None))
    changes: list[dict[str, Any]] = [
        {},
        {"context": torch.ones(1, 21, 64)},
        {"y": torch.ones(1, 48)},
        {"guidance": torch.ones(1)},
        {"ref_latents": [torch.ones(1, 16, 4, 4)]},
        {"ref_latents_method": "uxo"},
        {"control": {"input": [], "output": [torch.ones(1, 64, DIM)]}},
        {"transformer_options": {"rope_options": ROPE}},
        {},
    ]
    for change in changes:
        assert_equal_to_native(checkpoint, remote, 2, first | change)


def test_schnell_has_no_use_for_guidance(tmp_path: Path, remote: Remote) -> None:
    path = write_tiny("flux", tmp_path / "schnell.safetensors", guidance=False)
    inputs = make_inputs()
    assert_equal_to_native(path, remote, 2, inputs)
    guided = remote(path, 2).evaluate(inputs)
    assert torch.equal(guided, remote(path, 2).evaluate(make_inputs(without=("guidance",))))


@pytest.mark.parametrize("channels", [32, 96], ids=["canny and depth", "fill"])
def test_models_with_concatenated_latents(tmp_path: Path, remote: Remote, channels: int) -> None:
    path = write_tiny("flux", tmp_path / "wide.safetensors", in_channels=channels)
    inputs = make_inputs(channels=channels, height=17)
    assert native(path, inputs).shape == (1, 16, 17, 16)
    assert_equal_to_native(path, remote, 2, inputs)


def test_todays_names_of_the_norms(checkpoint: Path, tmp_path: Path, remote: Remote) -> None:
    renamed = write_tiny("flux", tmp_path / "renamed.safetensors", norm_name="weight")
    inputs = make_inputs()
    found = remote(renamed, 2).evaluate(inputs)
    assert relative_error(found, native(checkpoint, inputs)) <= FP32_TOLERANCE


def test_sizes(checkpoint: Path) -> None:
    info = inspect_checkpoint(str(checkpoint))
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 6, 8)
    with pytest.raises(SizeError, match="num_heads=24 would have to be padded to 28"):
        info.check_tp_size(7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 4, 8, 8)}, "16"),
        ({"context": torch.zeros(1, 20, 65)}, "width 64"),
        ({"context": torch.zeros(2, 20, 64)}, "as many captions"),
        ({"timesteps": torch.zeros(2)}, "as many timesteps"),
        ({"ref_latents": [torch.zeros(1, 4, 8, 8)]}, "Reference latents"),
        (
            {
                "ref_latents": [torch.zeros(1, 16, 8, 8)],
                "ref_latents_method": "index_timestep_zero",
            },
            "'index_timestep_zero'",
        ),
        ({"attention_mask": torch.zeros(1, 20, 20)}, "84 tokens"),
        ({"control": {"input": [torch.zeros(1, 64, DIM + 1)]}}, "ControlNet"),
        ({"control": {"output": [torch.zeros(1, 65, DIM)]}}, "ControlNet"),
        ({"additional_t_cond": torch.zeros(1)}, "additional_t_cond"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    checkpoint: Path, remote: Remote, change: dict[str, Any], words: str
) -> None:
    inputs = make_inputs()
    with pytest.raises(InputError, match=words):
        remote(checkpoint, 2).evaluate(inputs | change)
    assert_equal_to_native(checkpoint, remote, 2, inputs)
