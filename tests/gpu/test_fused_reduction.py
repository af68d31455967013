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
from gpu.conftest import (
    FAMILIES,
    FP32_TOLERANCE,
    Load,
    evaluate,
    in_dtype,
    make_inputs,
    relative_error,
)

from support.paths import REPOSITORY
from support.tiny_models import tiny, write_tiny

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
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_on_one_gpu(load: Load, tmp_path: Path, family: str, ranks: int) -> None:
    path = write_tiny(family, tmp_path / "model.safetensors")
    inputs = make_inputs(family)
    of_dtype = {"float32": inputs, "bfloat16": in_dtype(inputs, torch.bfloat16)}
    given = {dtype: dict(tiny(family).prepared(one)) for dtype, one in of_dtype.items()}
    torch.save(given, tmp_path / "inputs.pt")
    found = results_of(tmp_path, ranks)
    written = evaluate(load(path, optimize="off"), inputs)
    assert max(relative_error(one, written) for one in found["float32"]) <= FP32_TOLERANCE
    rounded = of_dtype["bfloat16"]
    expected = evaluate(load(path, device="cpu"), in_dtype(rounded, torch.float32))
    in_bf16 = evaluate(load(path, "bfloat16", "off"), rounded)
    # Each rank's part of a sum is rounded for itself, as it is with any all-reduce.
    allowed = 1.25 * relative_error(in_bf16, expected)
    assert max(relative_error(one, expected) for one in found["bfloat16"]) <= allowed
