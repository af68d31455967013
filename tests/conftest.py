"""Fixtures shared by every suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import nothing_left_over
from support.tiny_models import write_tiny


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the groups of this run keep is not mixed with a person's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", str(tmp_path_factory.mktemp("tp-runtime")))
        yield


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Z-Image checkpoint (30 heads, width 480)."""
    return write_tiny("z_image", tmp_path_factory.mktemp("models") / "tiny_z_image.safetensors")


@pytest.fixture(scope="session")
def comfy_server(tiny_z_image: Path) -> Iterator[ComfyServer]:
    """One ComfyUI for the whole run, with `tiny_z_image.safetensors` among its models."""
    with nothing_left_over(), ComfyServer(env=NO_GPU) as server:
        (server.models / "diffusion_models" / tiny_z_image.name).symlink_to(tiny_z_image)
        yield server
