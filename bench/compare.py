"""Checks on GPUs that every way to run a step gives the same result.

    python -m bench.compare --models z_image flux --tp 1 2

Compares, in bf16, each TP size, optimised and not, with the first TP size as written, and each
step of an optimised run (as written, recorded, replayed) with the others.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from bench.dummy import dummy_file
from bench.inputs import make_inputs
from tp_runtime.client import GroupConfig, ModelSpec, Runtime
from tp_runtime.models import FAMILIES


def main() -> int:
    """Print one line a comparison; the exit status is 1 if one is over the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--tp", nargs="+", type=int, default=[1])
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--tolerance", type=float, default=3e-2)
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it works")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    references: dict[str, torch.Tensor] = {}
    right = True
    for tp_size in args.tp:
        runtime = Runtime()
        try:
            for model in args.models:
                path = dummy_file(model, args.folder, args.small)
                inputs = make_inputs(model, args.side, 1)
                for optimize in ("off", "auto"):
                    spec = ModelSpec.of(str(path), "bfloat16", "bfloat16", optimize)
                    remote = runtime.model(spec, GroupConfig.local(tp_size))
                    remote.ensure_loaded()
                    results = [remote.evaluate(inputs).float() for _ in range(3)]
                    expected = references.setdefault(model, results[0])
                    errors = [float((r - expected).norm() / expected.norm()) for r in results]
                    right &= all(error <= args.tolerance for error in errors)  # a NaN is not
                    print(f"{model} tp={tp_size} optimize={optimize} {errors=}", flush=True)
                    del remote
        finally:
            runtime.release()
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
