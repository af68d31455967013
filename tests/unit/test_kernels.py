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

def heads(length, num_heads, num_kv, dtype, extra=0, norms_in=None):
    width = (num_heads + 2 * num_kv) * 16
    rows = torch.randn(2, length, width + extra).to(dtype)
    norms = [(1 + 0.1 * torch.randn(16)).to(norms_in or dtype) for _ in range(2)]
    return rows[..., :width].unflatten(-1, (-1, 16)), *norms

# In bf16 against plain torch in fp32: both of a pair's normed values are rounded, by 2**-6 at most
# (they are below 8), and so is their rotation.
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, (1 + 2**0.5) * 2**-6)):
    for num_heads, num_kv in ((6, 6), (8, 8), (15, 15), (12, 3), (9, 1)):
        for lengths in ((5,), (3, 7)):
            exact = torch.float32 if num_kv < num_heads else None
            of = num_heads, num_kv, dtype, 16 * (len(lengths) - 1), exact
            parts = [heads(n, *of) for n in lengths]
            angle = torch.randn(sum(lengths), 8)
            rotation = torch.stack((angle.cos(), angle.sin()), dim=-1)[None, :, None]
            in_fp32 = [tuple(tensor.float() for tensor in part) for part in parts]
            expected = rotated_heads(in_fp32, rotation, 1e-6, num_kv)
            found = kernels.rotated_heads(parts, rotation, 1e-6, num_kv)
            assert found[0].shape[2] == num_heads and found[1].shape[2] == num_kv
            for one, other in zip(found, expected, strict=True):
                assert one.shape == other.shape and one.dtype == dtype
                assert other.abs().max() < 8
                torch.testing.assert_close(one.float(), other, rtol=0, atol=tolerance)
print("equal")
"""

# Of one rank, which has all heads, and of one of two; a row's chunks do not divide it. To bf16, the
# interpreter cuts off (3.6), where a GPU rounds.
_OVER_RANKS = """
import torch
from tp_runtime.gpu import kernels
from tp_runtime.models.layers import HeadsOfRank, normed_over_ranks

kernels._FEATURES_AT_A_TIME = 32
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, (1 + 2**0.5) * 2**-5)):
    for heads, batch, extra in ((3, 1, 0), (5, 2, 16)):
        width = heads * 16
        x = torch.randn(batch, 7, width + extra).to(dtype)[..., :width]
        weight = (1 + 0.1 * torch.randn(width)).to(dtype)
        angles = {"none": None, "of a token": torch.randn(1, 7, 1, 8)}
        angles["of a head"] = torch.randn(batch, 7, heads, 8)
        for angle in angles.values():
            rotation = None
            if angle is not None:
                rotation = torch.stack((angle.cos(), angle.sin()), dim=-1)
            for halves in (False, True):
                for other in (0, 48):
                    squares = torch.rand(batch, 7) if other else torch.zeros(batch, 7)

                    def add_up(own):
                        return own + squares.flatten()

                    given = HeadsOfRank(x, weight, width + other, 16, rotation, halves)
                    exact = given._replace(x=x.float(), weight=weight.float())
                    (expected,) = normed_over_ranks([exact], 1e-6, add_up)
                    own = kernels.sum_of_squares(x)
                    torch.testing.assert_close(own, x.float().square().sum(-1).flatten())
                    found = kernels.normed_heads(given, add_up(own) if other else None, 1e-6)
                    assert found.shape == (batch, 7, heads, 16) and found.dtype == dtype
                    assert expected.abs().max() < 8
                    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)
print("equal")
"""

# Two ranks' updates and targets in one process; rows that do not divide; one and two streams.
_REDUCTION = """
import torch
from tp_runtime.gpu import kernels
from tp_runtime.gpu.epilogue import Epilogue
from tp_runtime.models.layers import residual_norm

def in_fp32(epilogue):
    return Epilogue(*(one.float() if isinstance(one, torch.Tensor) else one for one in epilogue))

def addresses(tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors])

torch.manual_seed(0)
batch, length, width = 2, 5, 48
cases = [
    # (has a norm of its update, norm, gate, its own weights, modulated, a row each token, limit)
    (False, "layer", True, False, True, False, False),
    (False, "layer", True, False, True, False, True),
    (True, "rms", True, True, True, False, False),
    (True, "none", True, False, False, False, False),
    (True, "rms", False, True, False, False, False),
    (False, "layer", False, True, False, False, False),
    (False, "layer", True, True, True, True, False),
    (False, "rms", True, True, True, True, False),
]
for dtype, tolerance in ((torch.float32, 3e-6), (torch.float16, 2e-2), (torch.bfloat16, 6e-2)):
    for norm_update, norm, gated, weighted, modulated, each, limit in cases:
        for num_text in (length,) if each else (0, 3):
            limit = limit and dtype == torch.float16
            tokens = torch.randn(batch, length, width).to(dtype)
            updates = [torch.randn(batch, length, width).to(dtype) for _ in range(2)]
            if limit:
                tokens[1, 2, 5], updates[0][1, 2, 5], updates[1][1, 2, 5] = 65000, 65000, 0
            targets = [torch.full_like(tokens, torch.nan) for _ in range(2)]
            rows = (1, batch, length, 3, width) if each else (2, batch, 3, width)
            modulation = torch.randn(rows).to(dtype)
            modulation[..., 0, 5] = 1
            gate, shift, scale = modulation.unbind(-2)
            weight, bias, of_update = ((1 + 0.1 * torch.randn(width)).to(dtype) for _ in range(3))
            epilogue = Epilogue(
                1e-5,
                gate if gated else None,
                norm,
                scale if modulated else None,
                shift if modulated and norm == "layer" else None,
                weight if weighted else None,
                bias if weighted and norm == "layer" else None,
                of_update if norm_update else None,
                limit,
            )
            total = updates[0].float() + updates[1].float()
            ends = (slice(None),) if each else (slice(0, num_text), slice(num_text, None))
            expected = [
                residual_norm(
                    tokens[:, here].float() if not limit else tokens[:, here],
                    total[:, here] if not limit else total[:, here].half(),
                    (in_fp32 if not limit else Epilogue._make)(epilogue.of_stream(stream)),
                )
                for stream, here in enumerate(ends)
            ]
            expected = [torch.cat(same, dim=1) for same in zip(*expected)]
            new = [tokens.clone(), tokens.clone()]
            for rank in range(2):
                kernels.residual_norm(
                    addresses(updates), addresses(targets), new[rank], epilogue, num_text, rank, 2,
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

# Every token's stream in a list; one rank.
_LISTED = """
import torch
from tp_runtime.gpu import kernels
from tp_runtime.gpu.epilogue import Epilogue
from tp_runtime.models.layers import residual_norm

length, width = 7, 48
streams = torch.tensor([1, 1, 4, 0, 4, 2, 2])
for norm, modulated in (("rms", True), ("rms", False), ("layer", True)):
    tokens, update, target = torch.randn(3, 1, length, width).unbind(0)
    gate, shift, scale = torch.randn(5, 1, 3, width).unbind(2)
    rows = (scale, shift) if modulated else (None, None)
    weight = 1 + 0.1 * torch.randn(width)
    epilogue = Epilogue(1e-5, gate, norm, *rows, weight, streams=streams)
    expected = residual_norm(tokens, update, epilogue.of_stream(0))
    assert torch.equal(epilogue.of_stream(0).gate[0, 2], gate[4, 0])
    places = (torch.tensor([one.data_ptr()]) for one in (update, target))
    kernels.residual_norm(*places, tokens, epilogue, length, 0, 1)
    for found, wanted in zip((tokens, target), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=3e-6, atol=3e-6)
print("equal")
"""

_GELU = """
import torch
import torch.nn.functional as F
from tp_runtime.gpu import kernels

torch.manual_seed(0)
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


@pytest.mark.rotates(5)
@pytest.mark.parametrize(
    "comparison",
    [_COMPARISON, _OVER_RANKS, _GELU, _REDUCTION, _LISTED],
    ids=["rotation", "norm over ranks", "gelu", "reduction", "listed streams"],
)
def test_equal_plain_torch(comparison: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", comparison],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.stdout == "equal\n", result.stderr
