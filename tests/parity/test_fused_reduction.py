"""A whole step of every family through the GPU's fused kernels, on ranks without a GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, relative_error

from support.paths import REPOSITORY
from support.tiny_models import FluxSize, write_flux, write_qwen_image, write_z_image

pytestmark = pytest.mark.process

WRITERS = {"z_image": write_z_image, "flux": write_flux, "qwen_image": write_qwen_image}


def _inputs(family: str) -> dict[str, Any]:
    """Two latents and captions of 9 and 7 tokens; a ControlNet's residuals where they fit."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    inputs: dict[str, Any] = {
        "x": normal(2, 16, 1, 6, 6) if family == "qwen_image" else normal(2, 16, 6, 6),
        "timesteps": torch.tensor([0.7, 0.3]),
        "context": normal(2, 7, 64),
    }
    if family == "flux":
        residuals = normal(2, 9, FluxSize().dim)
        inputs["control"] = {"input": [residuals], "output": [None, residuals]}
    return inputs


@pytest.mark.parametrize(("family", "size"), [("z_image", 2), ("flux", 3), ("qwen_image", 2)])
def test_equals_the_step_as_written(tmp_path: Path, family: str, size: int) -> None:
    WRITERS[family](tmp_path / "model.safetensors")
    torch.save(_inputs(family), tmp_path / "inputs.pt")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(REPOSITORY),
    }
    program = Path(__file__).with_name("fused_rank.py")
    ranks = [
        subprocess.Popen([sys.executable, program, str(rank), str(size), tmp_path], env=environment)
        for rank in range(size)
    ]
    try:
        assert [rank.wait(timeout=400) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
    results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert relative_error(results["fused"], results["written"]) <= FP32_TOLERANCE
