"""The benchmark runs on CPU ranks, too, with small models, so that it is known to work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY

pytestmark = pytest.mark.process


def test_a_row_for_every_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.step", "--small", "--tp", "2", "--sides", "64"]
    command += ["--layouts", "1x2", "--batches", "2"]
    command += ["--steps", "2", "--folder", str(tmp_path), "--out", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=600)
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())
    assert {row["model"] for row in rows} == {"flux", "qwen_image", "z_image"}
    assert len(rows) == 6
    for row in rows:
        assert row["device"] == "cpu"
        assert (row["tp"], row["batch_groups"]) in ((2, 1), (1, 2))
        assert (row["side"], row["batch"]) == (64, 2)
        assert row["ms_median"] >= row["ms_min"] > row["ms_hop"]
        assert row["weights_gib"] > 0


def test_every_way_gives_the_same(tmp_path: Path) -> None:
    found = compare(tmp_path, "--models", "z_image", "flux", "--tp", "1", "2")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.partition(" errors=")[0] for line in lines] == [
        f"{model} tp={tp} optimize={optimize}"
        for tp in (1, 2)
        for model in ("z_image", "flux")
        for optimize in ("off", "auto")
    ]
    found = compare(tmp_path, "--models", "z_image", "--tp", "1", "2", "--tolerance", "1e-9")
    assert found.returncode == 1, "two ranks add up in another order"
    assert len(found.stdout.splitlines()) == 4


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compare", "--small", "--side", "64"]
    command += [*arguments, "--folder", str(folder)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
