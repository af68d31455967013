"""How far results may be from what is expected."""

import torch

# What sharding may change at most: the order in which fp32 products are summed.
FP32_TOLERANCE = 2e-6


def relative_error(
    found: torch.Tensor | list[torch.Tensor], expected: torch.Tensor | list[torch.Tensor]
) -> float:
    """Norm of the difference over the norm of what is expected, in fp64; of a list, the worst."""
    if isinstance(found, list):
        assert isinstance(expected, list)
        return max(relative_error(*pair) for pair in zip(found, expected, strict=True))
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
