"""8 bits between two GPUs, recorded and replayed, as if no NVLink connected them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.conftest import WRITERS, in_dtype, make_inputs, relative_error

from support.paths import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}


@pytest.mark.parametrize("layout", ["2x1", "1x2x1"])
@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_a_recorded_step(tmp_path: Path, family: str, layout: str) -> None:
    WRITERS[family](tmp_path / "model.safetensors")
    torch.save(in_dtype(make_inputs(family), torch.bfloat16), tmp_path / "inputs.pt")
    program = Path(__file__).with_name("two_gpus_rank.py")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, program, str(rank), layout, tmp_path],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in started] == [0, 0]
    finally:
        for rank in started:
            rank.kill()
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    for one in found["fast"]:
        errors = [relative_error(one, exact) for exact in found["exact"]]
        assert min(errors) > 0
        assert max(errors) < 3e-2
