"""Groups on a GPU. What is right, CPU ranks say: they are compared with ComfyUI's own models."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import support.inputs
from bench.step import flat
from support.tiny_models import tiny
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime
from tp_runtime.models import families

FAMILIES = sorted(families())
ONE_AT_A_TIME = ("minimax_h3",)  # no batches
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
        # Convolutions in fp32 (Wan's patches) are in TF32 by torch's default, as in ComfyUI.
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
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
    """What the family is given, a video of three frames where it can be one.

    Times that bf16, in which some models take them, has.
    """
    batch = 1 if family in ONE_AT_A_TIME else batch
    inputs = support.inputs.make_inputs(
        tiny(family), batch=batch, frames=3, height=height, width=width
    )
    times = torch.tensor([0.5, 0.25])[:batch]
    return inputs | {name: times for name in ("timesteps", "a_timestep") if name in inputs}


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs rounded, but for the timesteps, which stay fp32 in ComfyUI, too."""

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype)

    cast = pytree.tree_map_only(torch.Tensor, rounded, inputs)
    return cast | {"timesteps": inputs["timesteps"]}


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    """Where ComfyUI has them."""
    return pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, inputs)


def evaluate(model: RemoteModel, inputs: dict[str, Any]) -> torch.Tensor:
    """The result; of a video and its sound, both in one row."""
    return flat(model.evaluate(inputs))


def steps(model: RemoteModel, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """The same step three times: on a GPU as it is written, recorded, and replayed."""
    return [evaluate(model, inputs) for _ in range(3)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in fp64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())
