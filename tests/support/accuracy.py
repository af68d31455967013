"""How far results may be from what is expected."""

import torch

# What sharding may change at most: the order in which fp32 products are summed.
FP32_TOLERANCE = 2e-6


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in fp64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
