"""Checks on a GPU that every way to run a step gives the same result.

    python -m bench.compare --model z_image --tp 1 2

Compares, in bf16, each TP size, optimised and not, with TP 1 as written, and each step of an
optimised run (as written, recorded, replayed) with the others.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from bench.dummy import write_dummy
from bench.inputs import make_inputs
from tp_runtime import GroupConfig, ModelSpec, Runtime


def main() -> int:
    """Print one line a comparison; the exit status is 1 if one is over the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="z_image")
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=3e-2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    path = args.folder / f"dummy_{args.model}.safetensors"
    if not path.exists():
        write_dummy(args.model, path)
    inputs = make_inputs(args.model, args.side, 1)
    reference = None
    worst = 0.0
    for tp_size in args.tp:
        runtime = Runtime()
        try:
            for optimize in ("off", "auto"):
                spec = ModelSpec.of(str(path), "bfloat16", "bfloat16", optimize)
                remote = runtime.model(spec, GroupConfig.local(tp_size))
                remote.ensure_loaded()
                results = [remote.denoise(inputs).float() for _ in range(3)]
                if reference is None:
                    reference = results[0]
                errors = [float((r - reference).norm() / reference.norm()) for r in results]
                worst = max(worst, *errors)
                finite = all(bool(torch.isfinite(r).all()) for r in results)
                found = f"errors={errors} finite={finite}"
                print(f"{args.model} tp={tp_size} optimize={optimize} {found}", flush=True)
                if not finite:
                    return 1
        finally:
            runtime.release()
    return int(worst > args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
