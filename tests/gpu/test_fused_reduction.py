"""The sum over the ranks, residual and norm in one kernel, on real hardware: 2 and 4 ranks.

They share one GPU, which takes turns between their processes, so a step here takes a time that
means nothing. On GPUs of their own, the ranks run the same kernels on the same memory.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.conftest import FP32_TOLERANCE, WRITERS, Load, in_dtype, make_inputs, relative_error

from support.paths import REPOSITORY

pytestmark = pytest.mark.gpu


ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_DISABLE_PYNCCL": "1",
}


def results_of(folder: Path, ranks: int) -> dict[str, list[torch.Tensor]]:
    """What rank 0 saved: dtype → results of the same step."""
    program = Path(__file__).with_name("shared_gpu_rank.py")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    started = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(ranks), folder],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": path},
        )
        for rank in range(ranks)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in started] == [0] * ranks
    finally:
        for rank in started:
            rank.kill()
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", WRITERS)
def test_ranks_on_one_gpu(load: Load, tmp_path: Path, family: str, ranks: int) -> None:
    path = WRITERS[family](tmp_path / "model.safetensors")
    inputs = make_inputs(family)
    rounded = in_dtype(inputs, torch.bfloat16)
    torch.save({"float32": inputs, "bfloat16": rounded}, tmp_path / "inputs.pt")
    found = results_of(tmp_path, ranks)
    reference = load(path, device="cpu")
    written = load(path, optimize="off").evaluate(inputs)
    assert max(relative_error(one, written) for one in found["float32"]) <= FP32_TOLERANCE
    expected = reference.evaluate({name: value.float() for name, value in rounded.items()})
    allowed = relative_error(load(path, "bfloat16", "off").evaluate(rounded), expected)
    # Each rank's part of a sum is rounded for itself, as it is with any all-reduce.
    assert max(relative_error(one, expected) for one in found["bfloat16"]) <= 1.25 * allowed
