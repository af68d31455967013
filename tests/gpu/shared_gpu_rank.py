"""One of several ranks on the same GPU, which computes steps as on a GPU of its own.

    python shared_gpu_rank.py RANK RANKS FOLDER

NCCL refuses ranks that share a GPU, so the group's own collectives go through symmetric memory
here, as the fused sums do anyway. Reads `model.safetensors` and `inputs.pt` (dtype → inputs) in
FOLDER; rank 0 saves, for each dtype, what three steps gave, the last replayed from a CUDA graph.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed._symmetric_memory as symm_mem
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from bench.step import flat
from tp_runtime.client import ModelSpec
from tp_runtime.gpu import collectives
from tp_runtime.rank.loading import load_model

BYTES = 2**24


class Collectives:
    """The two of vLLM's group that a step uses beside the fused sums."""

    def __init__(self, group: Any) -> None:
        self._buffer = symm_mem.empty(BYTES, dtype=torch.uint8, device="cuda:0")
        self._handle = symm_mem.rendezvous(self._buffer, group.device_group)
        self._num_ranks = group.world_size

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._of_all(tensor), dim=dim)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._of_all(tensor)).float().sum(dim=0).to(tensor.dtype)

    def _of_all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        assert tensor.nbytes <= BYTES
        self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._handle.barrier(channel=1)
        parts = [
            self._handle.get_buffer(rank, tensor.shape, tensor.dtype).clone()
            for rank in range(self._num_ranks)
        ]
        self._handle.barrier(channel=1)
        return parts


def steps(
    path: Path, dtype: str, inputs: dict[str, Any], device: torch.device, rank: int, ranks: int
) -> list[torch.Tensor]:
    spec = ModelSpec.of(str(path), dtype, dtype)
    forward = load_model(spec, device, rank, ranks, lambda *_: None).forward
    results = [flat(forward(dict(inputs), "key")).cpu() for _ in range(3)]
    assert forward._reduction is not None
    assert forward._reduction._buffers, "the fused kernels were not used"
    return results


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    parallel_state.set_custom_all_reduce(False)
    collectives.nvlink = lambda: True  # a GPU can read its own memory
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cuda"))):
        rendezvous = f"file://{folder}/rendezvous"
        parallel_state.init_distributed_environment(ranks, rank, rendezvous, 0, "gloo")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        group = parallel_state.get_tp_group()
        shared = Collectives(group)
        group.all_gather, group.all_reduce = shared.all_gather, shared.all_reduce
        with torch.inference_mode():
            results = {
                dtype: steps(folder / "model.safetensors", dtype, inputs, device, rank, ranks)
                for dtype, inputs in torch.load(folder / "inputs.pt", map_location=device).items()
            }
        if rank == 0:
            torch.save(results, folder / "results.pt")
        group.barrier()


if __name__ == "__main__":
    main()
