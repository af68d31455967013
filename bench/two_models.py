"""Measures what it costs when two models take turns on one group, as Wan 2.2's two experts do.

    python -m bench.two_models --model wan --weights fp8 --tp 2 --side 832x480x81 --gpu-gib 24

Both are the same random file under two names. `--gpu-gib`: the memory of the GPUs that they are to
be tried for; what the GPUs have beyond it is taken before the group starts. Prints one row:
`switch_s`, how much longer than others an evaluation takes after one of the other model (the
largest, and the median, of `--switches`); `gib_read`, what the rank that read most has read of
files meanwhile; `asleep`, whether one model's weights wait in the host's memory; `error`, how far
results after a switch are from those before.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.dummy import WEIGHTS, dummy_file, sizes_of
from bench.errors import relative_error
from bench.extents import Extent
from bench.inputs import make_inputs
from bench.step import GIB, WARM_UPS, flat
from tp_runtime.client import GroupConfig, Layout, ModelSpec, RemoteModel, Runtime
from tp_runtime.models import families


def taken(gpu: int, left_gib: float) -> torch.Tensor:
    """Memory of a GPU, so that no more than that is left."""
    free, _ = torch.cuda.mem_get_info(gpu)
    size = max(0, free - int(left_gib * GIB))
    return torch.empty(size, dtype=torch.uint8, device=f"cuda:{gpu}")


def evaluated(remote: RemoteModel, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Seconds, what a sampler asks for before its first step included, and the result."""
    started = time.perf_counter()
    remote.ensure_loaded()
    result = flat(remote.evaluate(inputs)).cpu()
    return time.perf_counter() - started, result


def gib_read(runtime: Runtime) -> float:
    """Whatever the rank that read most has read since it began, from disks or Linux's memory."""
    (group,) = runtime.reports()
    return max(psutil.Process(rank["pid"]).io_counters().read_chars for rank in group.ranks) / GIB


def measure(args: argparse.Namespace, paths: list[Path]) -> dict[str, Any]:
    """The row."""
    inputs = make_inputs(args.model, sizes_of(args.model, args.small), args.side, 1)
    there = [taken(gpu, args.gpu_gib) for gpu in range(args.tp)] if args.gpu_gib else []
    runtime = Runtime()
    try:
        group = GroupConfig.of_layout(Layout(args.tp))
        specs = [ModelSpec.of(str(path), args.weight_dtype, "bfloat16") for path in paths]
        remotes = [runtime.model(spec, group) for spec in specs]
        steady, expected = [], []
        for remote in remotes:
            for _ in range(WARM_UPS):
                evaluated(remote, inputs)
            seconds, result = evaluated(remote, inputs)
            steady.append(seconds)
            expected.append(result)
        read = gib_read(runtime)
        switches, errors = [], []
        for index in range(args.switches):
            seconds, result = evaluated(remotes[index % 2], inputs)
            switches.append(seconds - steady[index % 2])
            errors.append(relative_error(result, expected[index % 2]))
        (report,) = runtime.reports()
        return {
            "model": args.model,
            "weights": args.weights,
            "tp": args.tp,
            "side": args.side.side,
            "gpu_gib": args.gpu_gib,
            "s_steady": round(statistics.median(steady), 3),
            "switch_s": round(max(switches), 3),
            "switch_median_s": round(statistics.median(switches), 3),
            "gib_read": round(gib_read(runtime) - read, 6),
            "asleep": any(model["asleep"] for model in report.models.values()),
            "error": float(f"{max(errors):.2e}"),
        }
    finally:
        runtime.release()
        del there


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(families()), required=True)
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--weight-dtype", default="bfloat16", help="of what is not quantised")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--side", type=Extent.parse, required=True)
    parser.add_argument("--gpu-gib", type=float)
    parser.add_argument("--switches", type=int, default=6)
    parser.add_argument("--small", action="store_true", help="a tiny model: tries the script")
    parser.add_argument("--folder", type=Path, help="where random files are kept")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        first = dummy_file(args.model, args.folder or Path(folder), args.small, args.weights)
        second = Path(folder) / f"other_{first.name}"
        second.symlink_to(first.resolve())
        row = measure(args, [first, second])
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
