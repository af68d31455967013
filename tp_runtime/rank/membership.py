"""Joins this process to its group as a rank, with vLLM's own initialisation."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    parallel_state,
)

from .. import machine
from ..config import WorkerConfig
from ..gpu import collectives
from . import imports


def select_device(config: WorkerConfig) -> torch.device:
    """The rank's device, made current. A rank is shown no GPUs but its group's on its host."""
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads)
        return torch.device("cpu")
    torch.set_num_threads(min(torch.get_num_threads(), machine.cores()))
    device = torch.device("cuda", config.local_rank)
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def tensor_parallel_group(config: WorkerConfig) -> Iterator[int]:
    """Be a member of the group; yields the tensor-parallel size that vLLM reports.

    vLLM takes consecutive ranks for its tensor-parallel groups, and tensor-parallel groups one
    behind another for what shares their tokens. Its parallel layers read a global
    configuration when they are built, so it stays set for as long as the group exists.
    """
    with imports.configuring():
        vllm_config = VllmConfig(device_config=DeviceConfig(device=config.device))
    with set_current_vllm_config(vllm_config):
        # It would serve a few small sums of a step, and ends the process where a CUDA graph's
        # memory is not of CUDA's plainest allocator (csrc/custom_all_reduce.cuh, 0.32).
        parallel_state.set_custom_all_reduce(False)
        with _nothing_named():
            parallel_state.init_distributed_environment(
                world_size=config.num_ranks,
                rank=config.rank,
                distributed_init_method=config.rendezvous,
                local_rank=config.local_rank,
                backend="nccl" if config.device == "cuda" else "gloo",
            )
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=config.tp_size,
                prefill_context_model_parallel_size=config.sequence_size,
            )
        collectives.connect_sharers()
        yield get_tensor_model_parallel_world_size()
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()


@contextlib.contextmanager
def _nothing_named() -> Iterator[None]:
    """In the body, vLLM makes no file in /dev/shm and no socket in the temporary folder.

    It would for its message queue, which we do not use (requests come over our own channel), and
    to count the hosts. A container may have no room for the file, and sockets stay when a process
    is killed. ``initialize_model_parallel`` has no argument for either (0.26 to 0.32).
    """
    make_group = parallel_state.init_model_parallel_group
    ask_shared_memory = parallel_state.in_the_same_node_as

    def make_group_without_queue(*args: Any, **options: Any) -> parallel_state.GroupCoordinator:
        return make_group(*args, **{**options, "use_message_queue_broadcaster": False})

    parallel_state.init_model_parallel_group = make_group_without_queue
    parallel_state.in_the_same_node_as = collectives.on_one_host
    try:
        yield
    finally:
        parallel_state.init_model_parallel_group = make_group
        parallel_state.in_the_same_node_as = ask_shared_memory


def versions() -> dict[str, str]:
    """Versions of the packages that compute, for the report."""
    return {name: importlib.metadata.version(name) for name in ("torch", "vllm", "diffusers")}
