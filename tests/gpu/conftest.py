"""Groups on a GPU. What is right, CPU ranks say: they are compared with ComfyUI's own models."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.tiny_models import tiny, write_tiny
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime

WRITERS: dict[str, Callable[..., Path]] = {
    "z_image": functools.partial(write_tiny, "z_image"),
    "flux": functools.partial(write_tiny, "flux"),
    "flux2": functools.partial(write_tiny, "flux2"),
    "qwen_image": functools.partial(write_tiny, "qwen_image"),
    "qwen_image_21": functools.partial(write_tiny, "qwen_image_21"),
    "krea2": functools.partial(write_tiny, "krea2"),
}
# What the order of sums may change in fp32.
FP32_TOLERANCE = 1e-5
# A GPU rounds exp differently, and the angles of the timestep's sinusoids go up to 1000.
DEVICE_TOLERANCE = 1e-4

Load = Callable[..., RemoteModel]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU there is nothing to test here."""
    if torch.cuda.is_available():
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; this machine has none"))


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", str(tmp_path_factory.mktemp("home")))
        runtime = Runtime()
        yield runtime
        runtime.release()


@pytest.fixture(scope="module")
def load(runtime: Runtime) -> Load:
    """`load(path, dtype, optimize, device)`: the file on a group of one rank."""

    def load(
        path: Path,
        dtype: str = "float32",
        optimize: str = "auto",
        device: str = "cuda",
        weight_dtype: str | None = None,
    ) -> RemoteModel:
        spec = ModelSpec.of(str(path), weight_dtype or dtype, dtype, optimize)
        model = runtime.model(spec, GroupConfig(1, device, (0,) if device == "cuda" else ()))
        model.ensure_loaded()
        return model

    return load


def make_inputs(family: str, height: int = 12, width: int = 8, batch: int = 2) -> dict[str, Any]:
    """Latents, and captions of 20 tokens; times that bf16, in which some models take them, has."""
    generator = torch.Generator().manual_seed(height)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    geometry = tiny(family).geometry
    frames = (1,) if geometry.video else ()
    (text_width,) = (axis[1] for axis in tiny(family).inputs["context"].axes if axis[0] == "width")
    inputs: dict[str, Any] = {
        "x": normal(batch, geometry.channels, *frames, height, width),
        "timesteps": torch.tensor([0.5, 0.25])[:batch],
        "context": normal(batch, 20, text_width),
    }
    if family == "flux":
        inputs["y"] = normal(batch, 48)
    if family in ("flux", "flux2"):
        inputs["guidance"] = torch.full((batch,), 4.0)
    return inputs


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs rounded, but for the timesteps, which stay fp32 in ComfyUI, too."""
    return {k: v if k == "timesteps" else v.to(dtype) for k, v in inputs.items()}


def steps(model: RemoteModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The same step three times: on a GPU as it is written, recorded, and replayed."""
    return [model.evaluate(inputs) for _ in range(3)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in fp64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
