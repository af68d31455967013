"""Our GPU kernel against plain torch, in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys

from support.paths import REPOSITORY

_COMPARISON = """
import torch
from tp_runtime import kernels
from tp_runtime.models.common import rotated_heads

def heads(length, num_heads, dtype, extra=0):
    rows = torch.randn(2, length, 3 * num_heads * 16 + extra).to(dtype)
    qkv = rows[..., : 3 * num_heads * 16].unflatten(-1, (3, num_heads, 16))
    norms = [(1 + 0.1 * torch.randn(16)).to(dtype) for _ in range(2)]
    return qkv, *norms

# A step of bf16 between 4 and 8, where the largest values of these lie.
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-5)):
    for num_heads in (6, 8, 15):
        for lengths in ((5,), (3, 7)):
            parts = [heads(n, num_heads, dtype, extra=16 * (len(lengths) - 1)) for n in lengths]
            angle = torch.randn(sum(lengths), 8)
            rotation = torch.stack((angle.cos(), angle.sin()), dim=-1)[None, :, None]
            expected = rotated_heads(parts, rotation, 1e-6)
            found = kernels.rotated_heads(parts, rotation, 1e-6)
            for one, other in zip(found, expected, strict=True):
                assert one.shape == other.shape and one.dtype == other.dtype
                torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
print("equal")
"""


def test_norm_and_rotation_equal_plain_torch() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", _COMPARISON],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "equal\n", result.stderr
