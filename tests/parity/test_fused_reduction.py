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
from support.ltx2_inputs import make_ltx2_inputs
from support.paths import REPOSITORY
from support.tiny_models import tiny, write_tiny
from support.z_image_controls import tensors_of
from tp_runtime.config import MODEL_PATCHES, Layout
from tp_runtime.models.qwen_image.model_patch import BlockWiseControl

pytestmark = pytest.mark.process


_FEW_TOKENS: dict[str, dict[str, Any]] = {
    "wan": {"frames": 2, "height": 4, "width": 6, "length": 5, "time_scale": 1000.0},
    "krea2": {"height": 6, "width": 4, "length": 5, "references": [(4, 4)]},
    "flux2": {"height": 3, "width": 2, "length": 5, "references": [(2, 2)]},
    "qwen_image_21": {"height": 6, "width": 4, "length": 5},
}
# With blocks of other kinds between the usual ones: changes of the tiny sizes, and inputs.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "": ({}, {}),
    "VACE": (
        {"num_blocks": 4, "vace_blocks": 2, "vace_channels": 96},
        {
            "lengths": {"videos": 2, "control frames": 2, "rows": 4, "columns": 6},
            "vace_strength": [0.7, 1.2],
        },
    ),
    "Animate": (
        {"num_blocks": 10, "in_channels": 36, "image_dim": 1280, "has_faces": True},
        {"lengths": {"pose frames": 1, "face frames": 1}},
    ),
    # A ControlNet whose sums use the same buffers as the model's, between two of them.
    "model patch": ({}, {}),
}


def _inputs(family: str, batch: int, seed: int, variant: str) -> dict[str, Any]:
    """Latents and captions of 9 and 7 tokens, or so; a ControlNet's residuals where they fit."""
    changes, more = VARIANTS[variant]
    if family in _FEW_TOKENS:
        return make_inputs(tiny(family, **changes), batch=batch, **_FEW_TOKENS[family], **more)
    if family == "ltx2":
        return make_ltx2_inputs(tiny(family), batch=batch)
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


def _control(family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A ControlNet that is a model patch: for the ranks, and as an input."""
    listed: dict[str, Any] = {"name": "control", "strength": 0.8}
    generator = torch.Generator().manual_seed(5)
    if family == "z_image":
        tensors = tensors_of("2.1 lite", sizes=tiny(family))
        hint = torch.randn(1, 33, 6, 6, generator=generator)
        listed |= {"hint": hint, "broken": False}
        return {"comfyui_model": "ZImage_Control", "tensors": tensors}, listed
    dim = tiny(family).dim
    shapes = BlockWiseControl(dim, tiny(family).num_blocks).table.file_tensors
    tensors = {
        name: torch.randn(shape, generator=generator) * dim**-0.5 + ("_rms" in name)
        for name, shape in shapes.items()
    }
    listed["hint"] = torch.randn(1, 9, dim, generator=generator)
    return {"comfyui_model": "QwenImageBlockWiseControlNet", "tensors": tensors}, listed


@pytest.mark.rotates(15)
@pytest.mark.parametrize(
    ("family", "layout", "held", "variant"),
    [
        ("z_image", Layout(2), 1, ""),
        ("flux", Layout(3), 1, ""),
        ("flux2", Layout(2), 1, ""),
        ("qwen_image", Layout(2), 0.6, ""),
        ("qwen_image_21", Layout(2), 1, ""),
        ("krea2", Layout(2), 1, ""),
        ("wan", Layout(2), 1, ""),
        ("wan", Layout(1), 1, "VACE"),
        ("wan", Layout(2), 1, "Animate"),
        ("ltx2", Layout(2), 1, ""),
        ("z_image", Layout(2, 2), 1, ""),
        ("flux", Layout(1, sequence_size=2), 1, ""),
        ("minimax_h3", Layout(2), 1, ""),
        ("z_image", Layout(2), 1, "model patch"),
        ("qwen_image", Layout(2), 1, "model patch"),
    ],
    ids=str,
)
def test_equals_the_step_as_written(
    tmp_path: Path, family: str, layout: Layout, held: float, variant: str
) -> None:
    """In every batch group, each of which has another part of the two latents.

    ``held``: what a rank's device may hold of its share; the rest is streamed.
    """
    path = write_tiny(family, tmp_path / "model.safetensors", **VARIANTS[variant][0])
    limit = int(held * path.stat().st_size / layout.tp_size) if held < 1 else 0
    groups = range(layout.batch_groups)
    batch = 2 // layout.batch_groups
    inputs = [_inputs(family, batch, 100 * group, variant) for group in groups]
    patches = {}
    if variant == "model patch":
        patches["control"], listed = _control(family)
        inputs = [one | {MODEL_PATCHES: [listed]} for one in inputs]
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.save(patches, tmp_path / "patches.pt")
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
    errors = [
        relative_error(result[again], result["written"])
        for result in results
        for again in ("fused", "again")
    ]
    assert max(errors) <= FP32_TOLERANCE, errors
    different = [result["written"] for result in results]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))
