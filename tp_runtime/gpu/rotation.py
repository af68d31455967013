"""ConvRot's rotation: neighbouring features, in groups, by a regular Hadamard matrix.

The matrix of 4^n is the Kronecker power of one of 4 x 4, over its root. It is symmetric and its own
inverse: rotating twice changes nothing, and (x H)(W H)^T = x W^T (comfy-kitchen 0.2.31,
``tensor/int8_utils.py``). A rotated weight has no outliers, so that int8 serves it.
"""

import functools

import torch

_FOUR = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@functools.lru_cache(maxsize=16)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(size, size) for a power of 4."""
    four = torch.tensor(_FOUR, dtype=torch.float64)
    matrix = four
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    assert len(matrix) == size, f"{size} is no power of 4"
    return (matrix / size**0.5).to(device, dtype)


def rotated(x: torch.Tensor, size: int) -> torch.Tensor:
    """(..., features), each ``size`` of them rotated; 0: none."""
    if size == 0:
        return x
    groups = x.unflatten(-1, (-1, size))
    return torch.matmul(groups, hadamard(size, x.dtype, x.device)).flatten(-2)
