"""Numbers in 8 bits, by blocks, as ranks send them with ``precision="fast"``; in plain torch.

A block is ``BLOCK`` numbers: an int8 code for each, and a scale in bf16, by which the codes are
multiplied. Codes of finite numbers go from -126 to 126; the three others are NaN and both
infinities, which so arrive where they were, and harm none beside them.

int8 and not fp8, and blocks of 32: what ranks send is near to normally distributed within so few
features. One rounding then costs 0.5 % of its norm, in e4m3 2.4 %; with blocks of 128 numbers and
an outlier in each, the others would be lost (``docs/scaling.md``).

A *segment* is what goes to one rank: the codes of a number of blocks, then their scales. Blocks are
counted over all segments of a tensor, one behind another. ``block_kernels`` has the same functions
for GPUs.
"""

import math

import torch

BLOCK = 32
LEVELS = 126
INFINITE, NOT_A_NUMBER = 127, -128
SMALLEST_SCALE = 1e-30
BLOCK_BYTES = BLOCK + 2
ALIGNED = 8  # blocks: so many take a multiple of 16 bytes


def num_blocks(size: int) -> int:
    """Of so many numbers."""
    return -(-size // BLOCK)


def segment_bytes(blocks: int, ranks: int = 1) -> int:
    """Of each of so many equal segments that have room for these blocks."""
    return -(-blocks // (ranks * ALIGNED)) * ALIGNED * BLOCK_BYTES


def encode(x: torch.Tensor, segments: torch.Tensor, first: int = 0) -> None:
    """Write a tensor's blocks, contiguous numbers of any float dtype, from block ``first`` on.

    ``segments`` (ranks, bytes) uint8. What is missing from the last block is zero.
    """
    size = x.numel()
    numbers = torch.zeros(num_blocks(size), BLOCK, dtype=torch.float32, device=x.device)
    numbers.flatten()[:size] = x.flatten()
    codes, scales = _codes(numbers)
    all_codes, all_scales = _views(segments)
    here = _places(len(numbers), first, all_codes)
    all_codes[here], all_scales[here] = codes, scales


def add_up(given: torch.Tensor, segment: torch.Tensor) -> None:
    """The sum, in fp32, of equal segments (ranks, bytes) uint8, into another one (bytes,)."""
    codes, scales = _views(given)
    total = torch.zeros(codes.shape[1:], dtype=torch.float32, device=given.device)
    for rank in range(len(given)):
        total += _numbers(codes[rank], scales[rank])
    (found_codes,), (found_scales,) = _views(segment[None])
    new_codes, new_scales = _codes(total)
    found_codes.copy_(new_codes)
    found_scales.copy_(new_scales)


def decode(segments: torch.Tensor, x: torch.Tensor, first: int = 0) -> None:
    """The inverse of ``encode``: into ``x``, contiguous."""
    all_codes, all_scales = _views(segments)
    here = _places(num_blocks(x.numel()), first, all_codes)
    numbers = _numbers(all_codes[here], all_scales[here])
    x.flatten().copy_(numbers.flatten()[: x.numel()])


def _views(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ranks, bytes) uint8 → codes (ranks, blocks, BLOCK) and scales (ranks, blocks)."""
    share = segments.shape[1] // BLOCK_BYTES
    codes = segments[:, : share * BLOCK].view(torch.int8).unflatten(1, (share, BLOCK))
    return codes, segments[:, share * BLOCK :].view(torch.bfloat16)


def _places(count: int, first: int, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rank and place in its segment, of so many blocks."""
    blocks = torch.arange(first, first + count, device=codes.device)
    return blocks // codes.shape[1], blocks % codes.shape[1]


def _codes(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., BLOCK) fp32 → codes and scales."""
    sizes = numbers.abs()
    finite = sizes < math.inf
    largest = torch.where(finite, sizes, 0.0).amax(-1)
    scales = (largest / LEVELS).clamp(min=SMALLEST_SCALE).to(torch.bfloat16)
    codes = (numbers * (1.0 / scales.float())[..., None]).clamp(-LEVELS, LEVELS).round()
    codes = torch.where(finite, codes, torch.where(numbers > 0, INFINITE, -INFINITE))
    return torch.where(numbers.isnan(), NOT_A_NUMBER, codes).to(torch.int8), scales


def _numbers(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The inverse, in fp32."""
    found = codes.float() * scales.float()[..., None]
    found = found.masked_fill(codes == INFINITE, math.inf)
    found = found.masked_fill(codes == -INFINITE, -math.inf)
    return found.masked_fill(codes == NOT_A_NUMBER, math.nan)
