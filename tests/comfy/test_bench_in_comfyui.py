"""`bench.in_comfyui` runs on the CPU, too, with small models, so that it is known to work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.comfy_server import NO_GPU
from support.paths import REPOSITORY, comfyui_path

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(5)]

SMALL = ["--small", "--cpu", "--side", "64", "--steps", "1", "--short-steps", "1", "--repeats", "1"]

KEYS = {"where", "device", "model", "weights", "layout", "cfg", "side", "batch", "previews"}
KEYS |= {"ms_step", "error", "first_prompt_s", "gpu_gib"}
KEYS |= {"commit", "torch", "vllm", "diffusers", "comfyui"}


@pytest.mark.parametrize(
    ("model", "control"), [("flux", ()), ("qwen_image", ("--control",)), ("z_image", ())]
)
def test_rows_of_a_model(tmp_path: Path, model: str, control: tuple[str, ...]) -> None:
    options = [*control, *SMALL, "--models", model, "--layouts", "2x1", "--folder", str(tmp_path)]
    options += ["--comfyui", str(comfyui_path()), "--commit", "0", "--out", str(tmp_path / "out")]
    subprocess.run(
        [sys.executable, "-m", "bench.in_comfyui", *options],
        cwd=REPOSITORY,
        env=os.environ | NO_GPU,
        check=True,
        timeout=400,
    )
    (file,) = (tmp_path / "out").iterdir()
    rows = json.loads(file.read_text())
    assert [row["control"] for row in rows] == [False, False, True, True][: 2 + 2 * len(control)]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (stock["layout"], ours["layout"]) == ("stock", "2x1")
        for row in (stock, ours):
            assert row.keys() >= KEYS
            assert (row["where"], row["model"], row["device"]) == ("comfyui", model, "cpu")
            assert math.isfinite(row["ms_step"])  # on a busy machine a step can look like none
            assert row["first_prompt_s"] > 0
        assert stock["error"] == 0
        assert 0 < ours["error"] <= 1e-2  # two ranks add up in another order, in bf16
