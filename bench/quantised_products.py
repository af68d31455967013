"""Measures products with quantised weights on one GPU: ms, and how far each is from fp32's.

    python -m bench.quantised_products [--results float16]

For each size, in bf16, or in fp16 as ComfyUI computes Wan: torch's product; with fp8 and int8
weights what the ranks compute (`gpu/quantised_products.py`), the tokens' quantisation alone, and
every kernel that may multiply them, each on a line; and in plain torch
(`rank/quantised_arithmetic.py`), which the errors of the others are measured beside.
`codes`: the share of the input's codes that differ from plain torch's, by one in int8, which
rounding a rotated value before or after the last bit does. A row whose error is above plain torch's
by a fifth is marked WRONG, and the exit status is 1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from tp_runtime.formats import E4M3, INT8, LayerFormat
from tp_runtime.gpu import quantised_products as products
from tp_runtime.gpu.rotation import rotated
from tp_runtime.rank.quantised_arithmetic import product

SIZES = [(4608, 3072, 3072), (4608, 3072, 12288), (4608, 12288, 3072)]  # tokens, inputs, outputs
LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
MORE = 1.2  # than plain torch's error


def milliseconds(run: Callable[[], object], count: int) -> float:
    """The median of one call, recorded as in a step, with the cache cold as between layers."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(count):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, over all."""
    return ((found.float() - exact).norm() / exact.norm()).item()


def quantised(weight: torch.Tensor, dtype: torch.dtype, rotation: int) -> tuple[torch.Tensor, ...]:
    """A weight as a file has it: in int8 by rows, in fp8 with one scale."""
    values = rotated(weight.float(), rotation)
    if dtype == torch.int8:
        scale = values.abs().amax(dim=1) / LIMITS[dtype]
        return (values / scale[:, None]).round().to(dtype), scale
    one = values.abs().amax() / LIMITS[dtype]
    return (values / one).to(dtype), one.expand(len(values)).contiguous()


def rotated_rows(
    x: torch.Tensor, dtype: torch.dtype, rotation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, rotated and quantised."""
    return products.quantised_rows(rotated(x, rotation), dtype)


def share_of_other_codes(x: torch.Tensor, dtype: torch.dtype, rotation: int) -> float:
    """Of the input's codes, against plain torch's."""
    codes, scale = rotated_rows(x, dtype, rotation)
    values = rotated(x, rotation).float()
    expected_scale = values.abs().amax(dim=1, keepdim=True) / LIMITS[dtype]
    torch.testing.assert_close(scale, expected_scale, rtol=2**-7, atol=0)
    expected = values / scale
    expected = expected.round() if dtype == torch.int8 else expected.to(dtype).float()
    return (codes.float() != expected).float().mean().item()


FORMS = (
    ("fp8 by rows", LayerFormat(E4M3), torch.float8_e4m3fn),
    ("int8", LayerFormat(INT8), torch.int8),
    ("int8 convrot 256", LayerFormat(INT8, rotation=256), torch.int8),
)


def compare(tokens: int, inputs: int, outputs: int, count: int, results: torch.dtype) -> bool:
    """Print the rows of one size; whether all products are right."""
    x = torch.randn(1, tokens, inputs, device="cuda").to(results)
    weight = (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(results)
    bias = torch.randn(outputs, device="cuda").to(results)
    exact = F.linear(x.float(), weight.float(), bias.float())
    work = 2 * tokens * inputs * outputs / 1e9  # GFLOP: over ms, TFLOP/s
    size = f"{tokens} x {inputs} x {outputs}"
    ms = milliseconds(partial(F.linear, x, weight, bias), count)
    found = error(F.linear(x, weight, bias), exact)
    name = str(results).removeprefix("torch.")
    print(f"{size:>20} {name:24} {ms:7.3f} {'':7} {work / ms:8.0f} {found:9.2e}")
    right = True
    for name, form, dtype in FORMS:
        rotation = form.rotation
        codes, scale = quantised(weight, dtype, rotation)
        assert products.can_multiply(dtype, x, codes), name
        rows = rotated_rows(x[0], dtype, rotation)
        whole = partial(products.product, x, codes, scale, bias, rotation)
        only_rows = partial(rotated_rows, x[0], dtype, rotation)
        row_codes, row_scale = rows
        given = row_codes, codes, row_scale, scale.view(1, -1), bias, x.dtype
        kernels = products.kernels_for(dtype, results)
        each = {kernel.__name__: partial(kernel, *given) for kernel in kernels}
        times = [milliseconds(run, count) for run in (whole, only_rows)]
        tensors = {"weight": codes, "weight_scale": scale}
        plain = error(product(form, tensors, x, bias, [outputs], of_integers=True), exact)
        # In plain torch fp8's input is not quantised, which adds as much again.
        bound = plain * (MORE if dtype == torch.int8 else 2**0.5 * MORE)
        found = error(whole(), exact)
        other = share_of_other_codes(x[0], dtype, rotation)
        mark = "" if found <= bound else "  WRONG"
        right = right and found <= bound
        print(
            f"{size:>20} {name:24} {times[0]:7.3f} {times[1]:7.3f} {work / times[0]:8.0f} "
            f"{found:9.2e} {plain:9.2e} {other:8.2%}{mark}"
        )
        for kernel, run in each.items():
            found, ms = error(run()[None], exact), milliseconds(run, count)
            mark = "" if found <= bound else "  WRONG"
            right = right and found <= bound
            print(f"{size:>20}   {kernel:22} {ms:7.3f} {'':7} {work / ms:8.0f} {found:9.2e}{mark}")
    return right


def main() -> int:
    """Print a table; 1 if a product is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=50, help="calls to time (default 50)")
    parser.add_argument(
        "--results", choices=("bfloat16", "float16"), default="bfloat16", help="(default bfloat16)"
    )
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(
        f"{'tokens x in x out':>20} {'form':24} {'ms':>7} {'rows':>7} "
        f"{'TFLOP/s':>8} {'error':>9} {'torch':>9} {'codes':>8}"
    )
    torch.manual_seed(0)
    right = [compare(*size, args.count, getattr(torch, args.results)) for size in SIZES]
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
