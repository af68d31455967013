"""Measures one evaluation through the runtime; prints a table and writes its rows as JSON.

    python -m bench.step --models z_image --tp 1 2 --sides 1024 --out bench/results

Each row: the wall-clock time of `RemoteModel.evaluate`, as ComfyUI sees it (request, transfer of
the latent from its device and back, step); `ms_hop`, what of it lies outside the slower rank, the
median of a few more steps; `floor_ratio`, the time over the least that the model's products and
attention take at the measured rate of a large matrix product, evenly split; `start_s` until the
ranks are up, `load_s` for reading the file, `first_s` for the first step; the memory on the worst
GPU. `--diffusers` adds rows (`tp` 0) of diffusers with compiled blocks on one GPU, in the same run.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.dummy import config_of, dummy_file
from bench.inputs import make_inputs
from tp_runtime.client import GroupConfig, Layout, ModelSpec, Runtime, visible_gpu_count
from tp_runtime.models import FAMILIES, family
from tp_runtime.sharding.block_costs import count_flops

GIB = 2**30
HOPS = 5
COLUMNS = [
    "model",
    "tp",
    "batch_groups",
    "side",
    "batch",
    "ms_median",
    "ms_min",
    "ms_p90",
    "ms_hop",
    "floor_ratio",
    "start_s",
    "load_s",
    "first_s",
    "weights_gib",
    "peak_gib",
]


def measure(
    path: Path, args: argparse.Namespace, model: str, layout: Layout, gemm_tflops: float | None
) -> list[dict[str, Any]]:
    """The rows of one model on one group."""
    config = config_of(model, args.small)
    runtime = Runtime()
    rows = []
    try:
        remote = runtime.model(
            ModelSpec.of(str(path), "bfloat16", "bfloat16", args.optimize),
            GroupConfig.local(layout.tp_size, batch_groups=layout.batch_groups),
        )
        started = time.perf_counter()
        began: list[float] = []  # to read: then the ranks were up
        remote.ensure_loaded(on_progress=lambda *_: began.append(time.perf_counter()))
        loaded = time.perf_counter()
        for side in args.sides:
            for batch in args.batches:
                inputs = make_inputs(model, side, batch)
                row = {
                    "model": model,
                    "tp": layout.tp_size,
                    "batch_groups": layout.batch_groups,
                    "side": side,
                    "batch": batch,
                    "optimize": args.optimize,
                    "start_s": round(began[0] - started, 1),
                    "load_s": round(loaded - began[0], 1),
                    "floor_ratio": None,
                    **_time_steps(remote, runtime, inputs, args.steps),
                }
                if gemm_tflops:
                    text = inputs["context"].shape[1]
                    stages = family(model).stages(config, (side // 16) ** 2, text)
                    floor_ms = batch * count_flops(stages) / gemm_tflops / 1e9 / layout.num_gpus
                    row["floor_ratio"] = round(row["ms_median"] / floor_ms, 2)
                rows.append(row)
                print(json.dumps(row), flush=True)
    finally:
        runtime.release()
    return rows


def _time_steps(
    remote: Any, runtime: Runtime, inputs: dict[str, Any], steps: int
) -> dict[str, Any]:

    def milliseconds() -> float:
        fresh = _like_a_sampler(inputs)
        started = time.perf_counter()
        result = remote.evaluate(fresh)
        if result.is_cuda:
            torch.cuda.synchronize()  # its way back is part of the step
        elapsed = 1000 * (time.perf_counter() - started)
        assert bool(result.isfinite().all()), "the result is not finite"
        return elapsed

    (
        first,
        *_,
    ) = (milliseconds() for _ in range(3))  # as written, recorded, replayed once
    times = sorted(milliseconds() for _ in range(steps))
    hops = []
    for _ in range(HOPS):  # apart, since asking the ranks wakes everybody up
        elapsed = milliseconds()
        ranks = runtime.reports()[0].ranks
        hops.append(elapsed - max(rank["last_evaluation_ms"] for rank in ranks))
    return {
        "ms_median": round(statistics.median(times), 2),
        "ms_min": round(times[0], 2),
        "ms_p90": round(times[int(0.9 * (len(times) - 1))], 2),
        "ms_hop": round(statistics.median(hops), 2),
        "first_s": round(first / 1000, 1),
        "weights_gib": round(
            max(sum(m["resident_bytes"] for m in r["models"].values()) for r in ranks) / GIB, 2
        ),
        "peak_gib": round(max(r["memory"].get("peak_bytes", 0) for r in ranks) / GIB, 2),
    }


def _like_a_sampler(inputs: dict[str, Any]) -> dict[str, Any]:
    """Another latent, and new tensors for the rest, too, as samplers make them at every step."""
    inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    inputs["x"].normal_()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return inputs


def environment(commit: str | None) -> dict[str, Any]:
    """What the rows are measured with. ``commit``: where the checkout has no git history."""
    if commit is None:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "vllm", "diffusers")}
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    rate = round(matmul_tflops()) if on_gpu else None
    return {"device": device, "commit": commit, **versions, "gemm_tflops": rate}


def matmul_tflops() -> float:
    """The rate of a large bf16 matrix product on the first GPU: what the floor is counted with."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return 2 * size**3 / statistics.median(times[5:]) / 1e9


def _of_diffusers(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of diffusers on one GPU, from a process of its own."""
    sizes = [f"{side}x{batch}" for side in options.sides for batch in options.batches]
    command = [sys.executable, "-m", "bench.diffusers_alone", model, str(options.steps), *sizes]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows: list[dict[str, Any]] = json.loads(found.splitlines()[-1])
    print(json.dumps(rows), flush=True)
    return [dict.fromkeys(COLUMNS) | row for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--models", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--layouts", nargs="+", type=Layout.parse, default=[], help="such as 2x2")
    parser.add_argument("--sides", nargs="+", type=int, default=[1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optimize", choices=["auto", "off"], default="auto")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--diffusers", action="store_true", help="measure diffusers, too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of the code, where git cannot tell")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, write the rows."""
    known = environment(options.commit)
    rate = known["gemm_tflops"]
    rows: list[dict[str, Any]] = []
    for model in options.models:
        path = dummy_file(model, options.folder, options.small)
        if options.diffusers:
            rows += [known | row for row in _of_diffusers(model, options)]
        for layout in [*map(Layout, options.tp), *options.layouts]:
            if visible_gpu_count() and layout.num_gpus > visible_gpu_count():
                print(f"{model} on {layout.num_gpus} GPUs left out: {visible_gpu_count()} here")
                continue
            rows += [known | row for row in measure(path, options, model, layout, rate)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"{date.today()}-{known['device'].replace(' ', '-')}.json"
        (options.out / name).write_text(json.dumps(rows, indent=1) + "\n")
    print(" ".join(f"{column:>12}" for column in COLUMNS))
    for row in rows:
        print(
            " ".join(f"{row[column] if row[column] is not None else '':>12}" for column in COLUMNS)
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
