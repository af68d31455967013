"""Measures one denoise step through the runtime; prints a table and writes its rows as JSON.

    python -m bench.step --models z_image --tp 1 2 --sides 1024 --out bench/results

Each row: the wall-clock time of `RemoteModel.denoise`, as ComfyUI sees it (request, transfer of
the latent both ways, step), its share inside the rank, and the memory on the worst GPU.
"""

import argparse
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

from bench.dummy import write_dummy
from bench.inputs import make_inputs
from tp_runtime import GroupConfig, ModelSpec, Runtime, visible_gpu_count

GIB = 2**30


def measure(path: Path, args: argparse.Namespace, model: str, tp_size: int) -> list[dict[str, Any]]:
    """The rows of one model on one group."""
    runtime = Runtime()
    rows = []
    try:
        remote = runtime.model(
            ModelSpec.of(str(path), "bfloat16", "bfloat16", args.optimize),
            GroupConfig.local(tp_size),
        )
        started = time.perf_counter()
        remote.ensure_loaded()
        load_s = time.perf_counter() - started
        for side in args.sides:
            for batch in args.batches:
                inputs = make_inputs(model, side, batch)
                rows.append(
                    {
                        "model": model,
                        "tp": tp_size,
                        "side": side,
                        "batch": batch,
                        "optimize": args.optimize,
                        "load_s": round(load_s, 1),
                        **_time_steps(remote, runtime, inputs, args.steps),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    finally:
        runtime.release()
    return rows


def _time_steps(
    remote: Any, runtime: Runtime, inputs: dict[str, Any], steps: int
) -> dict[str, Any]:
    times = []
    first_s = 0.0
    for step in range(steps + 3):  # as written, recorded, replayed once: then it counts
        inputs["x"] = torch.randn_like(inputs["x"])
        started = time.perf_counter()
        result = remote.denoise(inputs)
        elapsed = time.perf_counter() - started
        first_s = first_s or elapsed
        if step >= 3:
            times.append(1000 * elapsed)
    assert bool(result.isfinite().all()), "the result is not finite"
    ranks = runtime.reports()[0].ranks
    in_rank = max(rank["last_step_ms"] for rank in ranks)
    hop = times[-1] - in_rank
    times.sort()
    return {
        "ms_median": round(statistics.median(times), 2),
        "ms_min": round(times[0], 2),
        "ms_p90": round(times[int(0.9 * (len(times) - 1))], 2),
        "ms_hop": round(hop, 2),
        "first_s": round(first_s, 1),
        "weights_gib": round(
            max(sum(m["resident_bytes"] for m in r["models"].values()) for r in ranks) / GIB, 2
        ),
        "peak_gib": round(max(r["memory"].get("peak_bytes", 0) for r in ranks) / GIB, 2),
    }


def environment(commit: str | None) -> dict[str, str]:
    """What the rows were measured with. ``commit``: where the checkout has no git history."""
    if commit is None:
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "commit": commit, "torch": torch.__version__}


def main() -> int:
    """Run the measurements that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["z_image"])
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument("--sides", nargs="+", type=int, default=[1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optimize", choices=["auto", "off"], default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of the code, where git cannot tell")
    args = parser.parse_args()
    rows = []
    for model in args.models:
        path = args.folder / f"dummy_{model}.safetensors"
        if not path.exists():
            write_dummy(model, path)
        for tp_size in args.tp:
            if visible_gpu_count() and tp_size > visible_gpu_count():
                print(f"{model} on {tp_size} GPUs left out: {visible_gpu_count()} here")
                continue
            rows += [row | environment(args.commit) for row in measure(path, args, model, tp_size)]
    if args.out and rows:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"{date.today()}-{rows[0]['device'].replace(' ', '-')}.json"
        (args.out / name).write_text(json.dumps(rows, indent=1) + "\n")
    columns = [
        "model",
        "tp",
        "side",
        "batch",
        "ms_median",
        "ms_min",
        "ms_hop",
        "first_s",
        "weights_gib",
        "peak_gib",
    ]
    print(" ".join(f"{column:>12}" for column in columns))
    for row in rows:
        print(" ".join(f"{row[column]:>12}" for column in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
