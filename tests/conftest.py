"""Fixtures shared by every suite, what a run's options choose, and how workers share the tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import RUN, nothing_left_over, own_temporary_folder
from support.rotation import commit_of, left_out
from support.tiny_models import write_tiny
from tp_runtime.client import Runtime

if TYPE_CHECKING:
    from support.groups import GroupScheduling


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("rotation", "What repeats itself").addoption(
        "--rotate",
        metavar="COMMIT",
        help="leave out what has its turn at other commits (HEAD: as the one checked out does)",
    )
    parser.getgroup("web", "ComfyUI's page").addoption(
        "--page",
        help="run tests/web in this page alone: own, own-html, newer or newer-html",
    )
    parser.getgroup("templates", "ComfyUI's official templates").addoption(
        "--write-templates",
        action="store_true",
        help="keep what comes of the templates that are run, for docs/compatibility.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    # How long an example takes says nothing beside other workers; pytest-timeout ends what hangs.
    # A fixture of the function is made once for all examples, as our tests want it.
    unchecked = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("suite", deadline=None, suppress_health_check=unchecked)
    settings.load_profile("suite")
    # Once, for all workers: somebody may commit while they start.
    if config.option.rotate:
        config.option.rotate = commit_of(config.option.rotate)
    # vLLM's quantised layers import humming, and each rank would begin to build its CUDA part.
    os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
    # As where ranks are forked: diffusers would import it, which takes ten seconds, for no driver.
    sys.modules.setdefault("flashinfer", None)  # type: ignore[arg-type]
    if hasattr(config, "workerinput"):
        # Threads of OpenMP spin while they wait, on cores that other workers need.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


def pytest_report_header(config: pytest.Config) -> str:
    commit = config.option.rotate
    return f"what repeats itself: {f'--rotate {commit}' if commit else 'everything'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.rotate and (rest := left_out(items, config.option.rotate)):
        config.hook.pytest_deselected(items=list(rest))
        items[:] = [item for item in items if item not in rest]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "GroupScheduling | None":
    """Takes the place of what `--dist loadgroup` would be."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from support.groups import GroupScheduling

    return GroupScheduling(config, log)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """Groups of the module's own."""
    runtime = Runtime()
    yield runtime
    runtime.release()


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the groups of this run keep is not mixed with a person's, nor its leaks with others'."""
    basetemp = str(tmp_path_factory.getbasetemp())  # made now: not in the folder that goes
    with pytest.MonkeyPatch.context() as patch, own_temporary_folder():
        patch.setenv("TP_RUNTIME_HOME", str(tmp_path_factory.mktemp("tp-runtime")))
        patch.setenv(RUN, basetemp)
        yield


@pytest.fixture(scope="session")
def everything(pytestconfig: pytest.Config) -> bool:
    """Whether nothing is left out (`--rotate`): what repeats something then does so most often."""
    return not pytestconfig.option.rotate


@pytest.fixture(scope="session")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 Z-Image checkpoint (30 heads, width 480)."""
    return write_tiny("z_image", tmp_path_factory.mktemp("models") / "tiny_z_image.safetensors")


@pytest.fixture(scope="session")
def servers_leave_nothing() -> Iterator[None]:
    """Of the ComfyUIs that are there for a whole run; it is checked when all of them have ended."""
    with nothing_left_over():
        yield


@pytest.fixture(scope="session")
def comfy_server(servers_leave_nothing: None, tiny_z_image: Path) -> Iterator[ComfyServer]:
    """One ComfyUI for the whole run, with `tiny_z_image.safetensors` among its models."""
    with ComfyServer(env=NO_GPU) as server:
        (server.models / "diffusion_models" / tiny_z_image.name).symlink_to(tiny_z_image)
        yield server
