"""The benchmark runs on CPU ranks, too, with small models, so that it is known to work."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import step, two_models
from bench.errors import TOLERANCE
from tp_runtime.client import RemoteModel, residency

pytestmark = [pytest.mark.process, pytest.mark.rotates(3)]


@pytest.fixture(autouse=True)
def few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "HOPS", 1)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step.add_arguments(parser)
    return parser.parse_args(arguments)


def measured(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of `bench.step` with small models, and the rows that it wrote."""
    options = ["--small", "--sides", "64", "--steps", "2", "--folder", str(folder)]
    status = step.run(parsed(*options, "--out", str(folder), *arguments))
    (path,) = folder.glob("*.json")
    return status, json.loads(path.read_text())


MODELS = [
    "flux",
    "flux2",
    "krea2",
    "ltx2",
    "minimax_h3",
    "qwen_image",
    "qwen_image_21",
    "wan",
    "z_image",
]

# Of several latents, in batches of one, for which diffusers' module is not called alone.
ONE_AT_A_TIME = ("minimax_h3",)


def test_every_model_is_measured_unless_told_otherwise() -> None:
    assert sorted(parsed().models) == MODELS


@pytest.mark.rotates(9)
@pytest.mark.parametrize("model", sorted({*MODELS} - {"ltx2"}))  # diffusers wants sound, too
def test_rows_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str) -> None:
    layouts, batch, alone = ["--tp", "2", "--layouts", "1x2", "--exact"], 2, [f"diffusers {model}"]
    if model in ONE_AT_A_TIME:
        layouts, batch, alone = ["--tp", "1", "2", "--exact"], 1, []
    options = [*layouts, *(["--diffusers"] if alone else [])]
    status, rows = measured(tmp_path, "--models", model, *options, "--batches", str(batch))
    assert sorted(row["model"] for row in rows) == [*alone, model, model]
    for row in rows:
        assert row["device"] == "cpu"
        assert (row["tp"], row["batch_groups"]) in ((2, 1), (1, 2), (0, None), (1, 1))
        assert (row["side"], row["batch"]) == (64, batch)
        assert row["ms_median"] >= row["ms_min"] > 0
        assert row["weights_gib"] > 0
        assert math.isfinite(row["error"])
        assert 0 <= row["error"] <= TOLERANCE
        assert row["tp"] == 0 or 0 < row["noise"] <= TOLERANCE  # of bf16
        # Two ranks add up in another order, and diffusers computes some things in another.
        assert row["error"] > 0 or row["tp"] == 1
    assert status == 0
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.rotates(3)
@pytest.mark.parametrize("room", [True, False])
def test_two_models_take_turns(monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """Where there is no room for both, each is read again: so CPU ranks make it."""
    if not room:
        monkeypatch.setattr(residency, "ROOM_BYTES", 2**60)
    row = two_models.main(["--model", "wan", "--small", "--side", "64x64x5", "--switches", "4"])
    assert row["error"] == 0
    assert (row["gib_read"] < 1e-5) is room, row["gib_read"]
    assert not row["asleep"]


@pytest.mark.parametrize("wrong", [math.nan, 1.04])
def test_a_wrong_batch_group_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong: float,
) -> None:
    """The second one's results are multiplied; also where one evaluation would leave it idle."""
    right = RemoteModel.evaluate_all

    def evaluate_all(self: RemoteModel, *args: Any, **options: Any) -> list[torch.Tensor]:
        results = right(self, *args, **options)
        if self.group_config.batch_groups == 2 and sum(map(len, results)) == 2:
            results[-1][-1] *= wrong
        return results

    monkeypatch.setattr(RemoteModel, "evaluate_all", evaluate_all)
    layouts = ["--tp", "1", "--layouts", "1x2", "--batches", "1", "2"]
    status, rows = measured(tmp_path, "--models", "z_image", *layouts)
    assert status == 1
    found = {(row["batch_groups"], row["batch"]): row["error"] for row in rows}
    expected = abs(wrong - 1) if math.isfinite(wrong) else math.inf
    assert found == pytest.approx(
        {(1, 1): 0, (1, 2): 0, (2, 1): expected, (2, 2): expected}, abs=5e-3
    )
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.endswith("WRONG") for line in table] == [False, False, True, True]


def test_a_limit_of_what_gpus_hold(tmp_path: Path) -> None:
    """Of the measured group, which then streams; nothing is lost."""
    unlimited, limited = tmp_path / "unlimited", tmp_path / "limited"
    for folder, options in ((unlimited, []), (limited, ["--gpu-memory", "0.02"])):
        folder.mkdir()
        status, (row,) = measured(folder, "--models", "z_image", "--tp", "1", *options)
        assert (status, row["error"]) == (0, 0)
        assert (row["streamed_gib"] > 0) == (folder == limited)
        assert row["gpu_memory_gib"] == (0.02 if folder == limited else None)
    assert row["weights_gib"] <= 0.02


@pytest.mark.rotates(6)
@pytest.mark.parametrize("model", ["flux2", "krea2", "qwen_image", "qwen_image_21"])
def test_references(tmp_path: Path, model: str) -> None:
    options = ["--models", model, "--tp", "2", "--references", "2"]
    status, (row,) = measured(tmp_path, *options)
    assert (status, row["references"]) == (0, 2)
    assert 0 < row["error"] <= TOLERANCE


def test_a_model_without_references(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wan takes no references"):
        measured(tmp_path, "--models", "wan", "--tp", "1", "--references", "1")


def test_a_row_with_8_bits_says_so(tmp_path: Path) -> None:
    """And what they cost, which is more than bf16 and no mistake."""
    exact, fast = tmp_path / "exact", tmp_path / "fast"
    rows = {}
    for folder in (exact, fast):
        folder.mkdir()
        options = ["--models", "flux", "--tp", "2", "--precision", folder.name]
        status, (rows[folder.name],) = measured(folder, *options)
        assert status == 0
        assert rows[folder.name]["precision"] == folder.name
    assert rows["exact"]["error"] < rows["fast"]["error"] <= TOLERANCE
