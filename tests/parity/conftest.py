"""Real groups of CPU ranks for the parity tests, kept for a module: a start takes seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.accuracy import FP32_TOLERANCE, relative_error
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime

__all__ = ["FP32_TOLERANCE", "Remote", "relative_error"]

Remote = Callable[..., RemoteModel]


@pytest.fixture(scope="module")
def remote(runtime: Runtime) -> Remote:
    """`remote(path, tp_size, dtype, batch_groups, sequence_size)`: the file, loaded on such a group
    on the CPU.
    """

    def load(
        path: Path,
        tp_size: int,
        dtype: torch.dtype = torch.float32,
        batch_groups: int = 1,
        sequence_size: int = 1,
    ) -> RemoteModel:
        name = str(dtype).removeprefix("torch.")
        spec = ModelSpec.of(str(path), name, name)
        model = runtime.model(spec, GroupConfig(tp_size, "cpu", (), batch_groups, sequence_size))
        model.ensure_loaded()
        return model

    return load


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of a subclass of ``parity.suite.ParityTests``."""
    if "sized" in metafunc.fixturenames:
        sized = metafunc.cls.cases.sized
        metafunc.parametrize("sized", sized, ids=[f"{size}-{name}" for size, name in sized])
