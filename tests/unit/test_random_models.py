"""The random models of the benchmarks: what is wrong with a tensor must show in their results."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from bench.dummy import dummy_file
from tp_runtime.models import families

SEEDS = range(4)  # those that captions and latents are drawn with


@pytest.fixture
def matrices(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(dummy_file(request.param, tmp_path, small=True))
    return {name: one.float() for name, one in tensors.items() if one.ndim == 2}


@pytest.mark.parametrize("matrices", sorted(families()), indirect=True)
def test_no_matrix_equals_another(matrices: dict[str, torch.Tensor]) -> None:
    """Or one that is taken for the other would make no difference."""
    starts = {name: F.normalize(one.flatten()[:256], dim=0) for name, one in matrices.items()}
    for (name, one), (other_name, other) in itertools.combinations(starts.items(), 2):
        if one.shape == other.shape:
            assert one @ other < 0.9, (name, other_name)


@pytest.mark.parametrize("matrices", sorted(families()), indirect=True)
def test_no_input_is_a_row_of_a_matrix(matrices: dict[str, torch.Tensor]) -> None:
    """Or a caption's token alone would be looked at, and rounding grow from block to block."""
    for seed in SEEDS:
        drawn = torch.randn(2**16, generator=torch.Generator().manual_seed(seed))
        for name, one in matrices.items():
            width = one.shape[1]
            if width >= 32:
                given = F.normalize(drawn[: len(drawn) // width * width].view(-1, width), dim=1)
                assert (F.normalize(one, dim=1) @ given.T).max() < 0.9, name
