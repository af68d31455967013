"""How far a result is from that of one GPU which computes as it is written."""

import math
from typing import Any

import torch

TOLERANCE = 3e-2  # in bf16, where full-size models computed in another order differ by up to 2e-2
# With products in int8 or fp8, against products with the weights dequantised.
QUANTISED_TOLERANCE = 1e-1


def limit(noise: float | None, weights: str = "bf16") -> float:
    """What an error may be. ``noise``: the error of bf16 as written against fp32, if it is known.

    Of two results that are as far from fp32 as that, one may be up to twice as far from the other.
    """
    tolerance = TOLERANCE if weights == "bf16" else QUANTISED_TOLERANCE
    return tolerance if noise is None else max(tolerance, 2 * noise)


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row's results are not those of the model."""
    return not row["error"] <= limit(row.get("noise"), row.get("weights", "bf16"))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ of the worst item of the batch; infinite if not finite."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = (tensor.cpu().double().flatten(1) for tensor in (found, expected))
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    error: float = errors.max().item()  # NaN if one is
    return error if math.isfinite(error) else math.inf
