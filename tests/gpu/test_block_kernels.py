"""Numbers in 8 bits, by blocks: the kernels on a GPU against plain torch on the CPU."""

import math
from types import ModuleType

import pytest
import torch

from tp_runtime.gpu import block_codes
from tp_runtime.gpu.block_codes import num_blocks, segment_bytes

pytestmark = pytest.mark.gpu

# Ranks, and sizes of tensors that are sent together: of FLUX.1's two streams, and odd ones.
CASES = [(2, [512 * 3072, 4096 * 3072]), (3, [4999, 1, 31]), (8, [64, 70001]), (4, [33])]


def of_kernels(parts: list[torch.Tensor], ranks: int) -> list[torch.Tensor]:
    """Codes, their sum over the segments, and the numbers again; on the CPU."""
    from tp_runtime.gpu import block_kernels  # here: without a GPU there may be no Triton

    return [one.cpu() for one in _results(block_kernels, [part.cuda() for part in parts], ranks)]


def _results(codec: ModuleType, parts: list[torch.Tensor], ranks: int) -> list[torch.Tensor]:
    counts = [num_blocks(part.numel()) for part in parts]
    size = segment_bytes(sum(counts), ranks)
    sent = torch.zeros(ranks, size, dtype=torch.uint8, device=parts[0].device)
    summed, found, first = torch.zeros_like(sent[0]), [], 0
    for part, count in zip(parts, counts, strict=True):
        codec.encode(part, sent, first)
        found.append(torch.empty_like(part))
        codec.decode(sent, found[-1], first)
        first += count
    codec.add_up(sent, summed)
    return [sent, summed, *found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ranks", "sizes"), CASES)
def test_the_same_bits(dtype: torch.dtype, ranks: int, sizes: list[int]) -> None:
    torch.manual_seed(0)
    parts = [(torch.randn(size) * torch.randn(size).exp()).to(dtype) for size in sizes]
    parts[0][0], parts[0][2], parts[0][3] = math.nan, -math.inf, math.inf
    found, expected = of_kernels(parts, ranks), _results(block_codes, parts, ranks)
    for one, other in zip(found, expected, strict=True):
        # Of the NaNs there are, a GPU makes another one in bf16.
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_what_is_recorded_takes_the_numbers_of_its_replay() -> None:
    """As an evaluation is: nothing waits for the host, and no memory is taken anew."""
    from tp_runtime.gpu import block_kernels

    torch.manual_seed(0)
    x = torch.zeros(5000, dtype=torch.bfloat16, device="cuda")
    _results(block_kernels, [x], 2)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = _results(block_kernels, [x], 2)
    for _ in range(2):
        fresh = torch.randn(5000).bfloat16()
        x.copy_(fresh)
        graph.replay()
        for one, other in zip(recorded, _results(block_codes, [fresh], 2), strict=True):
            assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))


def test_what_the_passes_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 28 MiB, as FLUX.1's sums at 1024²: less than the link takes for half of it."""
    from tp_runtime.gpu import block_kernels

    x = torch.randn(4608 * 3072, device="cuda").bfloat16()
    segments = torch.empty(
        2, segment_bytes(num_blocks(x.numel()), 2), dtype=torch.uint8, device="cuda"
    )
    passes = {
        "encode": lambda: block_kernels.encode(x, segments),
        "add_up": lambda: block_kernels.add_up(segments, segments[0].clone()),
        "decode": lambda: block_kernels.decode(segments, x),
    }
    total = 0.0
    for name, call in passes.items():
        call()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(20):
            call()
        stop.record()
        stop.synchronize()
        ms = start.elapsed_time(stop) / 20
        total += ms
        with capsys.disabled():
            print(f"\n{name}: {ms:.3f} ms", end="")
    assert total < 0.5
