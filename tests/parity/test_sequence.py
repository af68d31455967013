"""Tokens that several ranks share, on real ranks, against ComfyUI's own models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from parity.suite import native
from parity.test_wan import TestVace as Vace

from support.inputs import make_inputs
from support.newer_references import CASES as NEWER_CASES
from support.newer_references import expected, inputs_of, write_case
from support.tiny_models import tiny, write_tiny

pytestmark = pytest.mark.process

_REFERENCES = {"references": ((9, 8), (4, 6))}
_ODD = {"height": 9, "width": 7, "length": 5, "batch": 2}
_ANIMATE = {"num_blocks": 5, "in_channels": 36, "image_dim": 1280, "has_faces": True}
_MOVING = {"pose frames": 2, "face frames": 1}
# Family → changes of the tiny model's sizes, and inputs.
CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "z_image": [({}, {}), ({}, _ODD)],
    "flux": [
        ({}, _REFERENCES),
        ({}, _ODD | {"mask": (2, 25, 25)}),
        ({}, {"residuals": {"input": (48, None), "output": (None, 60)}}),
        ({}, {"length": 1}),  # a rank without a token of the text
    ],
    "flux2": [({}, _REFERENCES), ({}, _ODD)],
    "qwen_image": [({}, _REFERENCES), ({}, _ODD)],
    "wan": [
        ({}, {"frames": 3, "height": 6, "width": 10, "batch": 2}),
        ({"reference_channels": 16}, {"frames": 2, "height": 5, "width": 6}),
        ({}, {"frames": 3, "height": 4, "width": 6, "times_per_item": 3}),
        (_ANIMATE, {"frames": 3, "height": 2, "width": 6, "batch": 2, "lengths": _MOVING}),
    ],
}
# Of families whose classes newer releases have: cases that are stored.
STORED = {
    "krea2": ["odd sizes", "references at time 0, batch"],
    "flux2": ["references at time 0", "references at time 0 with a ControlNet"],
    "qwen_image": ["2511 with a ControlNet", "captions of different lengths"],
    "minimax_h3": list(NEWER_CASES["minimax_h3"])[:3],
    "wan": ["SCAIL-2", "Animate 2, strengths, timesteps of frames"],
    "qwen_image_21": ["odd sizes, gate and up apart", "references at its ends, batch"],
    "ltx2": [
        *("2.5", "2.0", "other rotary embedding", "odd sizes, batch"),
        *("a part of both", "a guide with a mask", "a voice"),
        "a voice without sound",
    ],
}
LAYOUTS = [(1, 2), (1, 3), (2, 2), (1, 4)]  # TP size, ranks that share the tokens
MORE_RANKS = [(1, 5, 1), (1, 7, 1), (3, 2, 1), (1, 2, 2), (2, 2, 2)]  # and batch groups

Write = Callable[[str, dict[str, Any]], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    folder = tmp_path_factory.mktemp("sequence")

    def write(family: str, changes: dict[str, Any]) -> Path:
        path = folder / f"{family}{'-'.join(changes)}.safetensors"
        return path if path.exists() else write_tiny(family, path, **changes)

    return write


def cases() -> list[tuple[str, int]]:
    return [(family, index) for family, each in CASES.items() for index in range(len(each))]


@pytest.mark.rotates(8)
@pytest.mark.parametrize(("family", "index"), cases())
@pytest.mark.parametrize(("tp_size", "sequence_size"), LAYOUTS)
def test_fp32(
    written: Write, remote: Remote, family: str, index: int, tp_size: int, sequence_size: int
) -> None:
    changes, arguments = CASES[family][index]
    path, inputs = written(family, changes), make_inputs(tiny(family, **changes), **arguments)
    found = remote(path, tp_size, sequence_size=sequence_size).evaluate(inputs)
    if family == "z_image":  # ComfyUI's class is told what ours sees
        inputs |= {"num_tokens": inputs["context"].shape[1]}
    assert relative_error(found, native(path, inputs)) <= FP32_TOLERANCE


@pytest.mark.rotates(8)
@pytest.mark.parametrize("layout", MORE_RANKS)
@pytest.mark.parametrize("family", ["z_image", "flux"])
def test_more_ranks(
    written: Write, remote: Remote, family: str, layout: tuple[int, int, int]
) -> None:
    """Some have no head, or none of the text; the batch may be divided, too."""
    tp_size, sequence_size, batch_groups = layout
    path, inputs = written(family, {}), make_inputs(tiny(family), **_ODD)
    model = remote(path, tp_size, batch_groups=batch_groups, sequence_size=sequence_size)
    found = model.evaluate(inputs)
    if family == "z_image":
        inputs |= {"num_tokens": inputs["context"].shape[1]}
    assert relative_error(found, native(path, inputs)) <= FP32_TOLERANCE


@pytest.mark.rotates(3)
@pytest.mark.parametrize("sequence_size", [2, 3])
def test_control_videos(tmp_path: Path, remote: Remote, sequence_size: int) -> None:
    """VACE's, which have tokens of their own."""
    path = write_tiny("wan", tmp_path / "tiny.safetensors", **Vace.cases.changes)
    inputs = Vace.cases.inputs("two videos")
    found = remote(path, 1, sequence_size=sequence_size).evaluate(inputs)
    assert relative_error(found, native(path, inputs)) <= FP32_TOLERANCE


@pytest.mark.rotates(8)
@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family, each in STORED.items() for case in each]
)
@pytest.mark.parametrize(("tp_size", "sequence_size"), LAYOUTS)
def test_stored(
    tmp_path: Path, remote: Remote, family: str, case: str, tp_size: int, sequence_size: int
) -> None:
    path = write_case(family, tmp_path / "tiny.safetensors", NEWER_CASES[family][case][0])
    model = remote(path, tp_size, sequence_size=sequence_size)
    found = model.evaluate(inputs_of(family, case, torch.float32))
    wanted = expected(family, case, torch.float32)
    if isinstance(found, torch.Tensor):
        found, wanted = [found], [wanted]
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) <= FP32_TOLERANCE
