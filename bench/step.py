"""Measures one evaluation through the runtime; prints a table, and adds its rows to a file.

    python -m bench.step --models z_image --tp 1 2 --sides 1024 --out bench/results
    python -m bench.step --models wan --tp 1 2 4 --sides 832x480x81 1280x720x81

Rows are added to the file of the day in `--out`, those of a model as soon as they are there.

Each row: the wall-clock time of `RemoteModel.evaluate`, as ComfyUI sees it (request, transfer of
the latent from its device and back, evaluation); `ms_hop`, what of it lies outside the slower rank,
the median of a few more; `floor_ratio`, the time over the least that the model's products and
attention take at the measured rate of a large matrix product, evenly split; `start_s` until the
ranks are up, `load_s` for reading the file, `first_s` for the first one; the memory on the worst
GPU. `--diffusers` adds rows (`tp` 0) of diffusers with compiled blocks on one GPU, in the same run.

`error`: how far the results are from those of one GPU that computes as it is written, on the same
inputs; the largest of all evaluations of the row, and of all items of their batches. With batch
groups that a batch does not fill, several evaluations at once are compared, too. `--exact`: also
compute in fp32 on one GPU, which must hold the model so; `noise` is the error of bf16 as written
against that. A row whose error is above 3e-2, and above twice its noise if that is known, is marked
WRONG, and the exit status is 1: its times are no result.

`--gpu-memory`: what each GPU may hold of the weights; the rest is streamed from the host's memory
(`streamed_gib` of a GPU's). Only the measured group has the limit, not what it is compared with.

`--weights`: of the blocks' linears, in a file as ComfyUI has them. "As it is written" is then with
the weights dequantised; products in int8 or fp8 also round what is multiplied with them, and their
error may be up to 1e-1.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bench.dummy import WEIGHTS, dummy_file, sizes_of
from bench.errors import is_wrong, relative_error
from bench.extents import Extent
from bench.inputs import make_inputs, of_step
from bench.rows import add_rows
from tp_runtime.client import (
    PRECISIONS,
    GroupConfig,
    Layout,
    ModelSpec,
    RemoteModel,
    Runtime,
    ahead,
    visible_gpu_count,
)
from tp_runtime.models import families, family_named
from tp_runtime.models.family import Sizes
from tp_runtime.sharding.block_costs import count_flops

GIB = 2**30
HOPS = 5
WARM_UPS = 3  # as written, recorded, replayed
COLUMNS = [
    "model",
    "weights",
    "tp",
    "sequence_size",
    "batch_groups",
    "side",
    "batch",
    "error",
    "noise",
    "ms_median",
    "ms_min",
    "ms_p90",
    "ms_hop",
    "floor_ratio",
    "start_s",
    "load_s",
    "first_s",
    "weights_gib",
    "streamed_gib",
    "peak_gib",
]


@dataclass(frozen=True)
class Case:
    """Inputs that differ in latents and timesteps, and what one GPU makes of each, as written.

    ``noise``: how far the worst of that is from what it makes in fp32; None: not known.
    """

    inputs: list[dict[str, Any]]
    expected: list[torch.Tensor]  # on the CPU
    noise: float | None = None


def cases(
    path: Path, args: argparse.Namespace, model: str, layouts: list[Layout]
) -> dict[tuple[Extent, int], Case]:
    """Every (extent, batch). The group that computes what to expect is ended."""
    sizes, runtime = sizes_of(model, args.small), Runtime()
    found = {}
    try:
        remote = runtime.model(
            ModelSpec.of(str(path), "bfloat16", "bfloat16", "off"), GroupConfig.of_layout(Layout(1))
        )
        remote.ensure_loaded()
        for extent in args.sides or Extent.usual(family_named(model))[:1]:
            for batch in args.batches:
                # Two at least: a replayed graph must take what it is given, not that of before.
                num_steps = max([2, *(_evaluations_at_once(layout, batch) for layout in layouts)])
                given = make_inputs(model, sizes, extent, batch, args.references)
                inputs = [of_step(given, step) for step in range(num_steps)]
                expected = [flat(remote.evaluate(one)).cpu() for one in inputs]
                found[extent, batch] = Case(inputs, expected)
    finally:
        runtime.release()
    return _with_noise(path, found) if args.exact else found


def _with_noise(
    path: Path, cases: dict[tuple[Extent, int], Case]
) -> dict[tuple[Extent, int], Case]:
    """The same, each with its noise."""
    runtime = Runtime()
    try:
        exact = runtime.model(
            ModelSpec.of(str(path), "float32", "float32", "off"), GroupConfig.of_layout(Layout(1))
        )
        exact.ensure_loaded()
        return {
            key: dataclasses.replace(
                case,
                noise=max(
                    relative_error(expected, flat(exact.evaluate(_in_fp32(inputs))).cpu())
                    for inputs, expected in zip(case.inputs, case.expected, strict=True)
                ),
            )
            for key, case in cases.items()
        }
    finally:
        runtime.release()


def _in_fp32(inputs: dict[str, Any]) -> dict[str, Any]:
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.float, inputs)


def flat(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """Of each item of the batch, a video's latents and its sound's in one row: (B, n).

    One tensor alone is as it is.
    """
    if isinstance(result, torch.Tensor):
        return result
    return torch.cat([one.flatten(1) for one in result], dim=1)


def _evaluations_at_once(layout: Layout, batch: int) -> int:
    """How many evaluations of a batch keep all batch groups busy."""
    return math.ceil(layout.batch_groups / batch)


def measure(
    path: Path,
    args: argparse.Namespace,
    model: str,
    layout: Layout,
    gemm_tflops: float | None,
    cases: dict[tuple[Extent, int], Case],
) -> list[dict[str, Any]]:
    """The rows of one model on one group."""
    runtime, group = Runtime(), GroupConfig.of_layout(layout)
    if args.gpu_memory is not None:
        group = dataclasses.replace(group, gpu_memory=int(args.gpu_memory * GIB))
    rows = []
    try:
        remote = runtime.model(
            ModelSpec.of(
                str(path), "bfloat16", "bfloat16", args.optimize, precision=args.precision
            ),
            group,
        )
        started = time.perf_counter()
        began: list[float] = []  # to read: then the ranks were up
        remote.ensure_loaded(on_progress=lambda *_: began.append(time.perf_counter()))
        loaded = time.perf_counter()
        for (extent, batch), case in cases.items():
            row = {
                "model": model,
                "tp": layout.tp_size,
                "sequence_size": layout.sequence_size,
                "batch_groups": layout.batch_groups,
                "side": extent.side,
                "batch": batch,
                "optimize": args.optimize,
                "precision": args.precision,
                "references": args.references,
                "gpu_memory_gib": args.gpu_memory,
                "start_s": round(began[0] - started, 1),
                "load_s": round(loaded - began[0], 1),
                "floor_ratio": None,
                **_time_steps(remote, runtime, case, args.steps),
            }
            at_once = _evaluations_at_once(layout, batch)
            if at_once > 1:  # one alone would leave groups idle
                row["error"] = max(row["error"], _error(remote, case, at_once))
            if gemm_tflops:
                flops = _flops(sizes_of(model, args.small), case.inputs[0])
                floor_ms = flops / gemm_tflops / 1e9 / layout.num_gpus
                row["floor_ratio"] = round(row["ms_median"] / floor_ms, 2)
            row["error"] = float(f"{row['error']:.2e}")
            row["noise"] = None if case.noise is None else float(f"{case.noise:.2e}")
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        runtime.release()
    return rows


def _time_steps(remote: RemoteModel, runtime: Runtime, case: Case, steps: int) -> dict[str, Any]:
    results: list[torch.Tensor] = []

    def milliseconds() -> float:
        fresh = _like_a_sampler(case.inputs[len(results) % len(case.inputs)])
        started = time.perf_counter()
        with ahead():  # as samplers do
            result = flat(remote.evaluate(fresh))
            if result.is_cuda:
                torch.cuda.synchronize()  # its way back is part of the step
        elapsed = 1000 * (time.perf_counter() - started)
        results.append(result)
        return elapsed

    first, *_ = (milliseconds() for _ in range(WARM_UPS))
    times = sorted(milliseconds() for _ in range(steps))
    hops = []
    ranks = runtime.reports()[0].ranks
    for _ in range(HOPS):  # apart, since asking the ranks wakes everybody up
        before, elapsed = ranks, milliseconds()
        ranks = runtime.reports()[0].ranks
        hops.append(elapsed - milliseconds_of(before, ranks))
    return {
        # After all of them: comparing would wake up cores that sleep between a sampler's steps.
        "error": max(
            relative_error(result, case.expected[index % len(case.expected)])
            for index, result in enumerate(results)
        ),
        "ms_median": round(statistics.median(times), 2),
        "ms_min": round(times[0], 2),
        "ms_p90": round(times[int(0.9 * (len(times) - 1))], 2),
        "ms_hop": round(statistics.median(hops), 2),
        "first_s": round(first / 1000, 1),
        "peer_access": ranks[0]["peer_access"],
        "weights_gib": round(
            max(sum(m["resident_bytes"] for m in r["models"].values()) for r in ranks) / GIB, 3
        ),
        "streamed_gib": round(
            max(sum(m["streamed_bytes"] for m in r["models"].values()) for r in ranks) / GIB, 3
        ),
        "peak_gib": round(max(r["memory"].get("peak_bytes", 0) for r in ranks) / GIB, 2),
    }


def milliseconds_of(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> float:
    """What evaluations between two reports of the ranks took the slowest of them."""
    pairs = zip(before, after, strict=True)
    return max(later["evaluation_ms"] - sooner["evaluation_ms"] for sooner, later in pairs)


def _flops(sizes: Sizes, inputs: dict[str, Any]) -> int:
    """What the model's products and attention of one evaluation count."""
    x, geometry = inputs["x"], sizes.geometry
    batch, *latent = (x if isinstance(x, torch.Tensor) else x[0]).shape
    text, image = inputs["context"].shape[1], geometry.image_tokens(tuple(latent))
    if not geometry.references_once:
        pictures = [one.shape[1:] for one in inputs.get("ref_latents", ())]
        image += sum(geometry.image_tokens(tuple(shape)) for shape in pictures)
    blocks = sizes.table.block_costs(geometry.padded(text), geometry.padded(image))
    return batch * count_flops(blocks)


def _error(remote: RemoteModel, case: Case, at_once: int) -> float:
    """The largest error of several evaluations at once, which all batch groups take part in."""
    errors = []
    for first in range(WARM_UPS):
        chosen = [(first + index) % len(case.inputs) for index in range(at_once)]
        results = remote.evaluate_all([_like_a_sampler(case.inputs[index]) for index in chosen])
        pairs = zip(results, chosen, strict=True)
        errors += [relative_error(flat(result), case.expected[index]) for result, index in pairs]
    return max(errors)


def _like_a_sampler(inputs: dict[str, Any]) -> dict[str, Any]:
    """New tensors for everything, as samplers make them at every step."""
    inputs = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, inputs)
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


def _of_diffusers(
    path: Path, args: argparse.Namespace, cases: dict[tuple[Extent, int], Case]
) -> list[dict[str, Any]]:
    """Rows of diffusers on one GPU, from a process of its own."""
    listed = [
        (extent.side, batch, case.inputs, case.expected) for (extent, batch), case in cases.items()
    ]
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(listed, file.name)
        command = [sys.executable, "-m", "bench.diffusers_alone"]
        command += [str(path), str(args.steps), file.name]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows: list[dict[str, Any]] = json.loads(found.splitlines()[-1])
    print(json.dumps(rows), flush=True)
    return [dict.fromkeys(COLUMNS) | row for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    known = sorted(families())
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--tp", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument(
        "--layouts", nargs="+", type=Layout.parse, default=[], help="such as 2x2, or 1x2x1"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        type=Extent.parse,
        help="1024, or 832x480x81 for 81 frames (default: what the model usually makes)",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--references", type=int, default=0, help="pictures of the same size that it looks at"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["bf16"])
    parser.add_argument("--optimize", choices=["auto", "off"], default="auto")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="exact",
        help="fast: sums and exchanges in 8 bits, unless NVLink connects the GPUs",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="of weights that each GPU may hold (default: as many as fit)",
    )
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--exact", action="store_true", help="find the noise of bf16, too")
    parser.add_argument("--diffusers", action="store_true", help="measure diffusers, too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="of the code, where git cannot tell")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, write the rows; 1 if a row is wrong."""
    if options.diffusers and options.references:
        raise SystemExit("--diffusers: rows of diffusers are without --references")
    known = environment(options.commit)
    rate = known["gemm_tflops"]
    rows: list[dict[str, Any]] = []
    layouts = []
    for layout in [*map(Layout, options.tp), *options.layouts]:
        if visible_gpu_count() and layout.num_gpus > visible_gpu_count():
            print(f"{layout.num_gpus} GPUs left out: {visible_gpu_count()} here")
        else:
            layouts.append(layout)
    for model, weights in itertools.product(options.models, options.weights):
        path = dummy_file(model, options.folder, options.small, weights)
        of_model = cases(path, options, model, layouts)
        of_layouts = (measure(path, options, model, one, rate, of_model) for one in layouts)
        alone = options.diffusers and weights == "bf16"
        of_diffusers = [_of_diffusers(path, options, of_model)] if alone else []
        for measured in itertools.chain(of_diffusers, of_layouts):
            found = [row | known | {"weights": weights} for row in measured]
            if options.out and found:
                add_rows(options.out, found)
            rows += found
    print(" ".join(f"{column:>12}" for column in COLUMNS))
    for row in rows:
        cells = [row[column] if row[column] is not None else "" for column in COLUMNS]
        print(" ".join(f"{cell:>12}" for cell in cells), "WRONG" * is_wrong(row))
    return int(any(map(is_wrong, rows)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
