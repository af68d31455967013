"""Numbers in 8 bits, by blocks: what is lost, and the kernels for GPUs against plain torch."""

import math
import os
import subprocess
import sys

import pytest
import torch

from support.paths import REPOSITORY
from tp_runtime.gpu.block_codes import (
    BLOCK,
    LEVELS,
    add_up,
    decode,
    encode,
    num_blocks,
    segment_bytes,
)
from tp_runtime.layouts.cost_model import BYTES, CODED


def there_and_back(x: torch.Tensor, ranks: int = 1) -> torch.Tensor:
    segments = torch.empty(ranks, segment_bytes(num_blocks(x.numel()), ranks), dtype=torch.uint8)
    encode(x, segments)
    found = torch.empty_like(x)
    decode(segments, found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (31,), (2, 33), (3, 7, 129), (64, 32)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_each_number_is_off_by_half_a_step_of_its_block(
    dtype: torch.dtype, shape: tuple[int, ...], ranks: int
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
    found = there_and_back(x, ranks)
    assert found.dtype == dtype
    size = x.numel()
    padded = torch.zeros(num_blocks(size) * BLOCK)
    padded[:size] = x.flatten().abs().float()
    largest = padded.view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)[:size].view(shape)
    # Of the scale in bf16, and of the result in its dtype, a little more.
    allowed = largest * (0.5 + 0.25 + LEVELS * torch.finfo(dtype).eps) / LEVELS
    assert ((found.float() - x.float()).abs() <= allowed).all()


def test_what_one_rounding_costs() -> None:
    """As `docs/scaling.md` says: of normally distributed numbers, less than fp8 costs."""
    torch.manual_seed(0)
    x = torch.randn(2**16)
    error = (there_and_back(x) - x).norm() / x.norm()
    assert 0.005 < error < 0.006
    in_fp8 = x.to(torch.float8_e4m3fn).float()
    assert (in_fp8 - x).norm() / x.norm() > 4 * error


def test_zeros_stay_zeros_and_tiny_numbers_small() -> None:
    assert torch.equal(there_and_back(torch.zeros(40)), torch.zeros(40))
    tiny = torch.full((40,), 1e-38)
    assert (there_and_back(tiny).abs() <= 1e-30).all()
    large = torch.full((40,), 3e38)
    torch.testing.assert_close(there_and_back(large), large, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_no_number_arrives_in_its_place(dtype: torch.dtype) -> None:
    """And harms no other number of its block."""
    torch.manual_seed(0)
    x = torch.randn(100).to(dtype)
    clean = there_and_back(x)
    x[[3, 50]], x[40], x[99] = math.nan, math.inf, -math.inf
    found = there_and_back(x)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(found), kind(x))
    there = x.isfinite()
    torch.testing.assert_close(found[there], clean[there], rtol=0, atol=0.02)


@pytest.mark.parametrize("ranks", range(2, 9))
def test_the_sum_is_of_what_was_sent(ranks: int) -> None:
    torch.manual_seed(ranks)
    parts = torch.randn(ranks, 1000)
    parts[1, 7], parts[0, 70], parts[1, 70] = math.nan, math.inf, -math.inf
    parts[0, 80] = parts[1, 80] = math.inf
    given = torch.empty(ranks, segment_bytes(num_blocks(1000)), dtype=torch.uint8)
    for part, segment in zip(parts, given, strict=True):
        encode(part, segment[None])
    summed = torch.empty_like(given[0])
    add_up(given, summed)
    found = torch.empty(1000)
    decode(summed[None], found)
    assert found.isnan().nonzero().flatten().tolist() == [7, 70]
    assert found.isposinf().nonzero().flatten().tolist() == [80]
    there, expected = found.isfinite(), parts.sum(0)
    error = (found - expected)[there].norm() / expected[there].norm()
    assert error < 0.009  # two roundings of 0.55 % each
    exact = torch.zeros(1000)
    for part in parts:
        exact += there_and_back(part)
    assert torch.equal(found[there], there_and_back(exact)[there])


def test_what_is_sent_is_what_is_predicted() -> None:
    numbers = 2**20
    assert segment_bytes(num_blocks(numbers)) == CODED * BYTES * numbers
    for ranks in range(1, 9):
        assert segment_bytes(num_blocks(numbers), ranks) % 16 == 0  # kernels read words


_COMPARISON = """
import math
import torch
from tp_runtime.gpu import block_codes, block_kernels
from tp_runtime.gpu.block_codes import num_blocks, segment_bytes

def bits(tensor):
    return tensor.view(torch.uint8)

torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for ranks, sizes in ((1, (5,)), (2, (31, 33)), (3, (4000, 0, 700)), (8, (64, 2049))):
        parts = [(torch.randn(size) * (2 * torch.randn(size)).exp()).to(dtype) for size in sizes]
        parts[0][0], parts[0][2], parts[-1][4] = math.nan, -math.inf, math.inf
        counts = [num_blocks(size) for size in sizes]
        size = segment_bytes(sum(counts), ranks)
        sent = {}
        for codec in (block_codes, block_kernels):
            sent[codec] = torch.zeros(ranks, size, dtype=torch.uint8)
            summed = torch.zeros(size, dtype=torch.uint8)
            first, found = 0, []
            for part, count in zip(parts, counts, strict=True):
                codec.encode(part, sent[codec], first)
                found.append(torch.empty_like(part))
                codec.decode(sent[codec], found[-1], first)
                first += count
            codec.add_up(sent[codec], summed)
            sent[codec] = [sent[codec], summed, *found]
        for one, other in zip(sent[block_codes], sent[block_kernels], strict=True):
            if one.dtype == torch.bfloat16:  # which the interpreter cuts, and a GPU rounds
                torch.testing.assert_close(one, other, rtol=2**-7, atol=0, equal_nan=True)
            else:
                assert torch.equal(bits(one), bits(other)), (dtype, ranks, sizes)
print("equal")
"""


def test_the_kernels_give_the_same_bits() -> None:
    """In Triton's interpreter, which needs no GPU; `tests/gpu` has the same on one."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", _COMPARISON],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.stdout == "equal\n", result.stderr
