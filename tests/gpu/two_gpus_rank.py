"""One of two ranks on two GPUs, which computes steps as on GPUs that no NVLink connects.

    python two_gpus_rank.py RANK LAYOUT FOLDER

Reads `model.safetensors` and `inputs.pt` in FOLDER; rank 0 saves, for each precision, what three
steps in bf16 gave: as written, recorded, and replayed.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import parallel_state

from tp_runtime.client import PRECISIONS, ModelSpec
from tp_runtime.config import Layout, WorkerConfig
from tp_runtime.gpu import collectives
from tp_runtime.rank import membership
from tp_runtime.rank.loading import load_model


def main() -> None:
    rank, layout, folder = int(sys.argv[1]), Layout.parse(sys.argv[2]), Path(sys.argv[3])
    sizes = layout.tp_size, layout.sequence_size, layout.batch_groups
    rendezvous = f"file://{folder}/rendezvous"
    config = WorkerConfig(rank, rank, *sizes, "cuda", 1, "WARNING", rendezvous)
    device = membership.select_device(config)
    collectives.nvlink = collectives.nvlink_of_sharers = lambda: False
    inputs: dict[str, Any] = torch.load(folder / "inputs.pt", map_location=device)
    found = {}
    with membership.tensor_parallel_group(config), torch.inference_mode():
        for precision in PRECISIONS:
            path = str(folder / "model.safetensors")
            spec = ModelSpec.of(path, "bfloat16", "bfloat16", precision=precision)
            model = load_model(spec, device, config.tp_rank, config.tp_size, lambda *_: None)
            assert model.precision == precision
            found[precision] = [model.forward(dict(inputs), "key").cpu() for _ in range(3)]
        if rank == 0:
            torch.save(found, folder / "results.pt")
        parallel_state.get_world_group().barrier()


if __name__ == "__main__":
    main()
