"""What a rank has imported once it has loaded and evaluated a model."""

import json
from pathlib import Path

import pytest
import torch
from process.conftest import PythonWith

from tp_runtime.client import GroupConfig, ModelSpec, Runtime, rank_processes

pytestmark = pytest.mark.process

WRITE_MODULES = """
import atexit, json, pathlib, sys
path = pathlib.Path({folder!r}) / f"{{config.rank}}.json"
atexit.register(lambda: path.write_text(json.dumps(sorted(sys.modules))))
"""


def test_a_rank_imports_nothing_that_only_others_need(
    tiny_z_image: Path,
    tmp_path: Path,
    python_with: PythonWith,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_processes, "CLOSE_TIMEOUT_S", 60.0)  # a machine may be busy
    python = python_with(WRITE_MODULES.format(folder=str(tmp_path)), light=False)
    runtime = Runtime()
    try:
        spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
        model = runtime.model(spec, GroupConfig(2, "cpu", python=python))
        model.ensure_loaded()
        latent = torch.ones(1, 16, 8, 8)
        inputs = {"timesteps": torch.ones(1), "context": torch.ones(1, 4, 64)}
        assert model.evaluate({"x": latent, **inputs}).isfinite().all()
    finally:
        runtime.release()
    for rank in range(2):
        modules = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "tp_runtime.models.z_image.forward" in modules
        rooms = ("client", "tools", "layouts", "ray_driver")
        strange = [f"tp_runtime.{room}" for room in rooms if f"tp_runtime.{room}" in modules]
        assert not strange
        assert "comfy" not in modules
