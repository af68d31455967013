"""Joins this process to its group as a rank, with vLLM's own initialisation."""

import contextlib
import importlib.metadata
from collections.abc import Iterator

import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    parallel_state,
)

from ..config import WorkerConfig


def select_device(config: WorkerConfig) -> torch.device:
    """The rank's device, made current. A rank is shown no GPUs but its group's on its host."""
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads)
        return torch.device("cpu")
    device = torch.device("cuda", config.local_rank)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def tensor_parallel_group(config: WorkerConfig) -> Iterator[int]:
    """Be a member of the group; yields the tensor-parallel size that vLLM reports.

    vLLM takes consecutive ranks for its tensor-parallel groups. Its parallel layers read a global
    configuration when they are built, so it stays set for as long as the group exists.
    """
    vllm_config = VllmConfig(device_config=DeviceConfig(device=config.device))
    with set_current_vllm_config(vllm_config):
        parallel_state.init_distributed_environment(
            world_size=config.num_ranks,
            rank=config.rank,
            distributed_init_method=config.rendezvous,
            local_rank=config.local_rank,
            backend="nccl" if config.device == "cuda" else "gloo",
        )
        # It would serve a few small sums of a step, and ends the process where a CUDA graph's
        # memory is not of CUDA's plainest allocator (csrc/custom_all_reduce.cuh, 0.32).
        parallel_state.set_custom_all_reduce(False)
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tp_size)
        # vLLM's message queue is a named file in /dev/shm; requests come over our own channel.
        parallel_state.get_tp_group().mq_broadcaster = None
        yield get_tensor_model_parallel_world_size()
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


def versions() -> dict[str, str]:
    """Versions of the packages that compute, for the report."""
    return {name: importlib.metadata.version(name) for name in ("torch", "vllm", "diffusers")}
