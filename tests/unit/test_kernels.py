"""Our GPU kernels against plain torch, in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys

import pytest

from support.paths import REPOSITORY

_COMPARISON = """
import torch
from tp_runtime.gpu import kernels
from tp_runtime.models.layers import rotated_heads

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

# Two ranks' updates and targets in one process; rows that do not divide; one and two streams.
_REDUCTION = """
import torch
from tp_runtime.gpu import kernels
from tp_runtime.models.layers import residual_norm

def addresses(tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors])

batch, length, width = 2, 5, 48
cases = [
    # (has a norm of its update, norm, limit)
    (False, "layer", False),
    (False, "layer", True),
    (True, "rms", False),
    (True, None, False),
]
for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 2e-2), (torch.bfloat16, 6e-2)):
    for norm_update, norm, limit in cases:
        for num_text in (0, 3):
            limit = limit and dtype == torch.float16
            tokens = torch.randn(batch, length, width).to(dtype)
            updates = [torch.randn(batch, length, width).to(dtype) for _ in range(2)]
            if limit:
                tokens[1, 2, 5], updates[0][1, 2, 5], updates[1][1, 2, 5] = 65000, 65000, 0
            targets = [torch.full_like(tokens, torch.nan) for _ in range(2)]
            modulation = torch.randn(2, batch, 3, width).to(dtype)
            modulation[:, :, 0, 5] = 1
            gate, shift, scale = modulation.unbind(2)
            if norm is None:
                shift = scale = None
            weights = [(1 + 0.1 * torch.randn(width)).to(dtype) for _ in range(2)]
            update_weight = weights[0] if norm_update else None
            norm_weight = weights[1] if norm == "rms" else None
            options = (update_weight, norm_weight, 1e-5, limit)
            total = updates[0].float() + updates[1].float()
            expected = [
                residual_norm(
                    tokens[:, here].float() if not limit else tokens[:, here],
                    total[:, here] if not limit else total[:, here].half(),
                    gate[stream],
                    None if shift is None else shift[stream],
                    None if scale is None else scale[stream],
                    *options,
                )
                for stream, here in enumerate((slice(0, num_text), slice(num_text, None)))
            ]
            expected = [torch.cat(same, dim=1) for same in zip(*expected)]
            new = [tokens.clone(), tokens.clone()]
            for rank in range(2):
                kernels.residual_norm(
                    addresses(updates), addresses(targets), new[rank], gate, shift, scale,
                    *options, num_text, rank, 2,
                )
            half = (batch * length) // 2
            rows = [one.flatten(0, 1) for one in new]
            joined = torch.cat((rows[0][:half], rows[1][half:])).view_as(tokens)
            for found, wanted in ((joined, expected[0]), *((t, expected[1]) for t in targets)):
                torch.testing.assert_close(
                    found.float(), wanted.float(), rtol=tolerance, atol=tolerance
                )
print("equal")
"""

_GELU = """
import torch
import torch.nn.functional as F
from tp_runtime.gpu import kernels

for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-7)):
    for widths in ((48, 1100), (1030, 96)):
        attended = torch.randn(2, 3, widths[0]).to(dtype)
        mlp = (3 * torch.randn(2, 3, 7 + widths[1])).to(dtype)[..., 7:]
        expected = torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1)
        found = kernels.attended_and_gelu(attended, mlp)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
print("equal")
"""


@pytest.mark.parametrize(
    "comparison", [_COMPARISON, _GELU, _REDUCTION], ids=["rotation", "gelu", "reduction"]
)
def test_equal_plain_torch(comparison: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", comparison],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "equal\n", result.stderr
