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
