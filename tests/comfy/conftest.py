"""What every test here needs: the stock result to compare with, and the check that all is well.

This folder has the name of ComfyUI's package `comfy`. Both are namespace packages, so their
contents merge: nothing here may have the name of one of ComfyUI's modules, and there must be no
`__init__.py`.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from support.comfy_history import History
from support.comfy_server import ComfyServer
from support.group_reports import rank_pids
from support.pack import pack_module
from support.tiny_models import write_tiny
from support.workflows import (
    Prompt,
    Sampling,
    stock_loader,
    stock_twin,
    text_to_latent,
    tp_text_to_latent,
)
from tp_runtime.client import GroupConfig

MODEL = "tiny_z_image.safetensors"
# The largest difference from the stock result, relative to its standard deviation.
TOLERANCE = 1e-5
# An adaptive sampler's next step follows from the difference of two results that are nearly equal,
# in which rounding weighs more: Qwen-Image's 1.7e-6 became 4.8e-5, and 2.2e-4 on another CPU.
ADAPTIVE_TOLERANCE = 5e-4

Compare = Callable[..., History]
Pids = Callable[[], list[int]]


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, relative to the standard deviation of what is expected."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.std())


@pytest.fixture(scope="session")
def references(comfy_server: ComfyServer) -> dict[int, torch.Tensor]:
    """Seed → what the stock nodes make of it."""
    latents = {}
    for seed in (7, 8):
        prompt = text_to_latent(stock_loader(MODEL), sampling=Sampling(seed=seed))
        latents[seed] = comfy_server.latent(comfy_server.run(prompt))
    return latents


@pytest.fixture(scope="session")
def works(comfy_server: ComfyServer, references: dict[int, torch.Tensor]) -> Pids:
    """`works()`: a prompt on two ranks gives the stock result now. Returns the ranks' pids."""
    seeds = itertools.cycle(references)

    def check() -> list[int]:
        # Another seed than last time: ComfyUI would give the old result without running anything.
        seed = next(seeds)
        history = comfy_server.run(tp_text_to_latent(MODEL, sampling=Sampling(seed=seed)))
        assert "sampler" not in history.cached
        assert largest_difference(comfy_server.latent(history), references[seed]) <= TOLERANCE
        return rank_pids(history)

    return check


@pytest.fixture(scope="module")
def loader() -> Iterator[ModuleType]:
    """The pack's module of that name."""
    with pack_module("nodes.loader") as module:
        yield module


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    """The pack's module `nodes.model`."""
    with pack_module("nodes.model") as module:
        yield module


@pytest.fixture
def unstarted(
    models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path, GroupConfig], Any]:
    """`unstarted(path, group)`: a MODEL in fp32 on a group that need not be started."""

    def made(path: Path, group: GroupConfig) -> Any:
        patcher = models.load_model(str(path), torch.float32, group, models.Placement(), "auto")
        monkeypatch.setattr(patcher.remote, "ensure_loaded", lambda **_: None)
        return patcher

    return made


@pytest.fixture
def file_of_loader(loader: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Z-Image: what the loader node of `loader` finds, whatever name it is asked for."""
    path = write_tiny("z_image", tmp_path / "model.safetensors")
    monkeypatch.setattr(loader, "model_path", lambda _: str(path))
    monkeypatch.setattr(loader.TPLoadDiffusionModel, "hidden", SimpleNamespace(unique_id="7"))
    return path


@pytest.fixture
def same_as_stock(comfy_server: ComfyServer) -> Compare:
    """`same_as_stock(prompt, tolerance, stock)`: every latent of it is what the stock nodes make.

    `stock` is the prompt on the stock model, if it differs in more than its loader and sampler.
    """

    def compare(
        prompt: Prompt, tolerance: float = TOLERANCE, stock: Prompt | None = None
    ) -> History:
        expected = comfy_server.latents(comfy_server.run(stock or stock_twin(prompt)))
        history = comfy_server.run(prompt)
        found = comfy_server.latents(history)
        assert found.keys() == expected.keys()
        for node_id, latent in expected.items():
            assert latent.isfinite().all()
            assert latent.std() > 0.1
            difference = largest_difference(found[node_id], latent)
            print(f"{node_id}: {difference:.1e}")
            is_adaptive = "adapt" in node_id.lower()
            assert difference <= max(tolerance, is_adaptive * ADAPTIVE_TOLERANCE), node_id
        return history

    return compare
