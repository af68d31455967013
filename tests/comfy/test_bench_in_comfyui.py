"""`bench.in_comfyui` runs on the CPU, too, with small models, so that it is known to work."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.comfy_server import NO_GPU
from support.newer import is_known
from support.paths import REPOSITORY, comfyui_path

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(5)]

SMALL = ["--small", "--cpu", "--side", "64", "--steps", "1", "--short-steps", "1", "--repeats", "1"]

KEYS = {"where", "device", "model", "weights", "layout", "cfg", "side", "batch", "previews"}
KEYS |= {"ms_step", "error", "first_prompt_s", "short_prompts_s", "gpu_gib"}
KEYS |= {"commit", "torch", "vllm", "diffusers", "comfyui"}


def of_newer(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not is_known(name), reason="needs ComfyUI 0.33")


@pytest.mark.parametrize(
    ("model", "more"),
    [
        pytest.param("flux", ()),
        pytest.param("qwen_image", ("--control",)),
        pytest.param("z_image", ("--exact",)),
        pytest.param("wan", ("--side", "64x64x9")),
        pytest.param("ltx2", ("--side", "64x64x9"), marks=of_newer("ltx2")),
        pytest.param(
            "minimax_h3", ("--side", "64x64x9", "--cfg", "1"), marks=of_newer("minimax_h3")
        ),
    ],
)
def test_rows_of_a_model(tmp_path: Path, model: str, more: tuple[str, ...]) -> None:
    options = [*SMALL, *more, "--models", model, "--layouts", "2x1", "--folder", str(tmp_path)]
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
    controlled = [False, True] if "--control" in more else [False]
    assert [row["control"] for row in rows] == [each for each in controlled for _ in range(2)]
    for stock, ours in zip(rows[::2], rows[1::2], strict=True):
        assert (stock["layout"], ours["layout"]) == ("stock", "2x1")
        for row in (stock, ours):
            assert row.keys() >= KEYS
            assert (row["where"], row["model"], row["device"]) == ("comfyui", model, "cpu")
            assert math.isfinite(row["ms_step"])  # on a busy machine a step can look like none
            assert row["first_prompt_s"] > 0
        assert stock["error"] == 0
        assert 0 < ours["error"] <= 1e-2  # two ranks add up in another order
        if "--exact" in more:
            # On a CPU the stock loader computes in fp32 as well.
            assert ours["from_fp32"] == ours["error"]
            assert ours["noise"] == stock["noise"] == stock["from_fp32"] == 0
