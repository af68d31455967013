"""Fixtures shared by every suite, what a run's options choose, and how workers share the tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import RUN, nothing_left_over
from support.rotation import ALL, this_commit
from support.tiny_models import write_tiny

if TYPE_CHECKING:
    from support.groups import GroupScheduling


def pytest_addoption(parser: pytest.Parser) -> None:
    rows = parser.getgroup("compatibility", "Rows of the compatibility suite")
    rows.addoption(
        "--all-rows",
        action="store_const",
        const=ALL,
        dest="rows_of",
        help="run each on every model, not on one that the commit chooses; and all repetitions",
    )
    rows.addoption(
        "--rows-of", dest="rows_of", metavar="COMMIT", help="run those that this commit chooses"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Once, for all workers: somebody may commit while they start.
    config.option.rows_of = config.option.rows_of or this_commit()
    # vLLM's quantised layers import humming, and each rank would begin to build its CUDA part.
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    # As where ranks are forked: diffusers would import it, which takes ten seconds, for no driver.
    sys.modules.setdefault("flashinfer", None)  # type: ignore[arg-type]
    if hasattr(config, "workerinput"):
        # Threads of OpenMP spin while they wait, on cores that other workers need.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    rows_of = config.option.rows_of
    option = "--all-rows" if rows_of == ALL else f"--rows-of {rows_of}"
    return f"compatibility rows, kills: {option}"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "GroupScheduling | None":
    """Takes the place of what `--dist loadgroup` would be."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from support.groups import GroupScheduling

    return GroupScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the groups of this run keep is not mixed with a person's, nor its leaks with others'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", str(tmp_path_factory.mktemp("tp-runtime")))
        patch.setenv(RUN, str(tmp_path_factory.getbasetemp()))
        yield


@pytest.fixture(scope="session")
def everything(pytestconfig: pytest.Config) -> bool:
    """Whether the run is `make test-all`: what repeats something then does so most often."""
    return bool(pytestconfig.option.rows_of == ALL)


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
