"""What the processes of a group are told by their environment."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import vllm.envs

from support.paths import comfyui_path
from tp_runtime.client.launch.environment import RANK_ENVIRONMENT, inherited_environment
from tp_runtime.client.launch.local import _rank_environment, _server_environment
from tp_runtime.config import GroupConfig

ALLOCATORS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def test_comfyuis_allocator_is_not_for_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """They could not record a step that several GPUs take part in."""
    for name in ALLOCATORS:
        monkeypatch.setenv(name, "backend:cudaMallocAsync")
    for environment in (
        inherited_environment(),
        _server_environment(),
        _rank_environment(GroupConfig(2, "cuda", (0, 1))),
    ):
        assert not set(ALLOCATORS) & environment.keys()


def test_vllm_sums_by_nccl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else it has is off, or uses NVLink multicast. The fused sums are our own."""
    switches = {name: switch() for name, switch in _vllm_switches(monkeypatch).items()}
    assert switches
    assert not {name for name, on in switches.items() if on}


def _vllm_switches(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """vLLM's, of how it sums, as a rank sees them."""
    for name, value in RANK_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return {
        name: switch
        for name, switch in vllm.envs.environment_variables.items()
        if name.startswith("VLLM_ALLREDUCE_USE_")
    }


def test_comfyui_sets_no_other_variable() -> None:
    """If it sets another variable than those one day, that must not reach the ranks either."""
    program = (
        "import os; before = set(os.environ); import cuda_malloc; print(*set(os.environ) - before)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=comfyui_path(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert set(found) <= set(ALLOCATORS)
