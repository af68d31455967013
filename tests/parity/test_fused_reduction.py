"""A whole step of every family through the GPU's fused kernels, on ranks without a GPU."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, relative_error

from support.inputs import make_inputs
from support.paths import REPOSITORY
from support.tiny_models import tiny, write_tiny
from tp_runtime.config import Layout

pytestmark = pytest.mark.process


def _inputs(family: str, batch: int, seed: int) -> dict[str, Any]:
    """Latents and captions of 9 and 7 tokens; a ControlNet's residuals where they fit."""
    if family == "minimax_h3":  # few tokens, of several times and modalities
        mask = torch.ones(1, 1, 1, 4, 4)
        mask[..., :2] = 0.5
        given = make_inputs(
            tiny(family),
            height=4,
            width=4,
            length=5,
            lengths={"samples": 1},
            time_scale=1000.0,
            masks={"denoise_mask": mask},
        )
        return dict(tiny(family).prepared(given))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))

    inputs: dict[str, Any] = {
        "x": normal(batch, 16, 1, 6, 6) if family == "qwen_image" else normal(batch, 16, 6, 6),
        "timesteps": torch.tensor([0.7, 0.3][:batch]),
        "context": normal(batch, 7, 64),
    }
    if family == "qwen_image":  # with modulation of its own
        inputs["ref_latents"] = [normal(batch, 16, 1, 4, 4)]
        inputs["ref_latents_method"] = "index_timestep_zero"
    if family == "flux":
        residuals = normal(batch, 9, tiny("flux").dim)
        inputs["control"] = {"input": [residuals], "output": [None, residuals]}
    return inputs


@pytest.mark.rotates(9)
@pytest.mark.parametrize(
    ("family", "layout", "held"),
    [
        ("z_image", Layout(2), 1),
        ("flux", Layout(3), 1),
        ("qwen_image", Layout(2), 0.6),
        ("z_image", Layout(2, 2), 1),
        ("minimax_h3", Layout(2), 1),
    ],
    ids=str,
)
def test_equals_the_step_as_written(
    tmp_path: Path, family: str, layout: Layout, held: float
) -> None:
    """In every batch group, each of which has another part of the two latents.

    ``held``: what a rank's device may hold of its share; the rest is streamed.
    """
    path = write_tiny(family, tmp_path / "model.safetensors")
    limit = int(held * path.stat().st_size / layout.tp_size) if held < 1 else 0
    groups = range(layout.batch_groups)
    inputs = [_inputs(family, 2 // layout.batch_groups, 100 * group) for group in groups]
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(REPOSITORY),
    }
    program = Path(__file__).with_name("fused_rank.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), str(layout), tmp_path, str(limit)],
            env=environment,
        )
        for rank in range(layout.num_gpus)
    ]
    try:
        assert [rank.wait(timeout=400) for rank in ranks] == [0] * layout.num_gpus
    finally:
        for rank in ranks:
            rank.kill()
    results = [torch.load(tmp_path / f"results-{group}.pt", weights_only=True) for group in groups]
    errors = [relative_error(result["fused"], result["written"]) for result in results]
    assert max(errors) <= FP32_TOLERANCE, errors
    if layout.batch_groups == 1:
        return
    different = [result["written"] for result in results]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))
