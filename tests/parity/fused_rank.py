"""One CPU rank that computes a step as written, and as on a GPU with fused kernels, twice.

    TRITON_INTERPRET=1 python fused_rank.py RANK LAYOUT FOLDER WEIGHT_LIMIT

The kernels run in Triton's interpreter, on buffers in memory that the ranks of a batch group share,
at another address in each. The first rank of batch group N saves all results of the N-th inputs.
WEIGHT_LIMIT: bytes of weights that its device may hold; 0: all of them.
Reads `model.safetensors`, `inputs.pt` (a list) and `patches.pt` in FOLDER: model patches by name,
each with ComfyUI's name of its class and its tensors.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import parallel_state

from tp_runtime.client import ModelSpec
from tp_runtime.config import Layout, ModelPatchSpec, WorkerConfig
from tp_runtime.gpu import graphs
from tp_runtime.gpu.reduction import FusedReduction, _Buffers
from tp_runtime.rank import membership
from tp_runtime.rank.loading import load_model
from tp_runtime.rank.model_patches import LoadedPatch


class SharedMemoryReduction(FusedReduction):
    """The ranks' buffers are maps of files; a gloo barrier takes the place of the GPU's."""

    folder: Path

    def _allocate(self, size: int) -> _Buffers:
        def of_rank(name: str, rank: int) -> torch.Tensor:
            path = str(self.folder / f"{name}{size}-{rank}")
            return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)

        ranks = parallel_state.get_tp_group().ranks
        self._maps = {
            name: [of_rank(name, rank) for rank in ranks] for name in ("updates", "targets")
        }
        updates, targets = self._maps["updates"], self._maps["targets"]
        addresses = [torch.tensor([m.data_ptr() for m in maps]) for maps in (updates, targets)]
        own = ranks.index(torch.distributed.get_rank())
        return _Buffers(updates[own], targets[own], *addresses, handle=None)

    def _wait(self, _buffers: _Buffers) -> None:
        torch.distributed.barrier(self._group)


def _own(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    return result.clone() if isinstance(result, torch.Tensor) else [x.clone() for x in result]


def _optimised(evaluate: Callable[..., Any], **inputs: Any) -> Any:
    with graphs._optimised():
        return evaluate(**inputs)


def _loaded(
    family: str, config: WorkerConfig, comfyui_model: str, tensors: dict[str, torch.Tensor]
) -> torch.nn.Module:
    """This rank's shard of a model patch."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    spec = ModelPatchSpec(family, comfyui_model, shapes, "float32")
    patch = LoadedPatch(spec, torch.device("cpu"), config.tp_rank, config.tp_size)
    patch.fill(tensors)
    return patch.module


def main() -> None:
    rank, layout, folder = int(sys.argv[1]), Layout.parse(sys.argv[2]), Path(sys.argv[3])
    rendezvous = f"file://{folder}/rendezvous"
    sizes = layout.tp_size, layout.sequence_size, layout.batch_groups
    config = WorkerConfig(rank, rank, *sizes, "cpu", 1, "WARNING", rendezvous)
    device = membership.select_device(config)
    every_input: list[dict[str, Any]] = torch.load(folder / "inputs.pt", weights_only=True)
    inputs = every_input[config.batch_group]
    with membership.tensor_parallel_group(config), torch.inference_mode():
        parallel_state.get_tp_group().barrier()
        spec = ModelSpec.of(str(folder / "model.safetensors"), "float32", "float32")
        place, limit = (device, config.tp_rank, config.tp_size), int(sys.argv[4])
        model = load_model(spec, *place, lambda *_: None, limit=limit or None)
        assert (model.streamed_bytes > 0) == (limit > 0)
        forward = model.forward
        family = forward.family.name
        patches = torch.load(folder / "patches.pt", weights_only=True)
        forward.model_patches = {
            name: _loaded(family, config, **patch) for name, patch in patches.items()
        }
        results = {"written": _own(forward(dict(inputs), "written"))}
        SharedMemoryReduction.folder = folder
        forward._reduction = SharedMemoryReduction(torch.device("cpu"))
        forward.run = functools.partial(_optimised, forward.run)  # and condition as written
        for again in ("fused", "again"):  # with the same conditioning, which must stay as it is
            results[again] = _own(forward(dict(inputs), "fused"))
        assert forward._reduction._buffers, "the fused kernels were not used"
        if config.rank % config.ranks_per_batch_group == 0:
            torch.save(results, folder / f"results-{config.batch_group}.pt")


if __name__ == "__main__":
    main()
