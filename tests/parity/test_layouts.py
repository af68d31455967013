"""TP size times batch groups, on real ranks, against ComfyUI's own model on the same tiny file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error
from parity.test_z_image import make_inputs, native

from support.tiny_models import write_tiny

pytestmark = pytest.mark.process

LAYOUTS = [(1, 2), (2, 1), (2, 2)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("z_image", tmp_path_factory.mktemp("z_image") / "tiny.safetensors")


def assert_right(path: Path, inputs: dict[str, Any], found: torch.Tensor) -> None:
    assert found.shape == inputs["x"].shape
    assert relative_error(found, native(path, inputs, torch.float32)) <= FP32_TOLERANCE


@pytest.mark.rotates(3)
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(("tp_size", "batch_groups"), LAYOUTS)
def test_batches(
    checkpoint: Path, remote: Remote, tp_size: int, batch_groups: int, batch: int
) -> None:
    inputs = make_inputs(batch, 9, 8, 20)
    found = remote(checkpoint, tp_size, batch_groups=batch_groups).evaluate(inputs)
    assert_right(checkpoint, inputs, found)


@pytest.mark.parametrize(("tp_size", "batch_groups"), LAYOUTS)
def test_texts_of_different_lengths_at_once(
    checkpoint: Path, remote: Remote, tp_size: int, batch_groups: int
) -> None:
    wanted = [make_inputs(1, 9, 8, length) for length in (20, 33, 5)]
    results = remote(checkpoint, tp_size, batch_groups=batch_groups).evaluate_all(wanted)
    for inputs, found in zip(wanted, results, strict=True):
        assert_right(checkpoint, inputs, found)


def test_a_conditioning_may_change_groups(checkpoint: Path, remote: Remote) -> None:
    """The ranks hold what only another group has computed with."""
    model = remote(checkpoint, 1, batch_groups=2)
    first, second = make_inputs(1, 9, 8, 20), make_inputs(1, 9, 8, 33)
    for wanted in ([first, second], [second, first], [second]):
        for inputs, found in zip(wanted, model.evaluate_all(wanted), strict=True):
            assert_right(checkpoint, inputs, found)


def test_every_rank_holds_the_shard_of_its_tp_rank(checkpoint: Path, remote: Remote) -> None:
    model = remote(checkpoint, 2, batch_groups=2)
    one, two, three, four = model.loaded_bytes()
    assert one == three
    assert two == four
    report = model._group.report(digests=True)
    assert (report.tp_size, report.batch_groups) == (2, 2)
    assert [rank["tp_world_size"] for rank in report.ranks] == [2] * 4
    digests = [rank["models"][model.name]["digest"] for rank in report.ranks]
    assert digests[:2] == digests[2:]
    assert digests[0] != digests[1]
