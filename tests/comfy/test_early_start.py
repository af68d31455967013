"""What the GPU processes are forked from is started before a sampler needs them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from support.comfy_history import PromptError
from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import SERVER_MARK, is_marked
from support.pack import pack_module
from support.waiting import wait_until
from support.workflows import node, tp_loader, tp_text_to_latent

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(2, "servers of their own")]

MODEL = "tiny_z_image.safetensors"
PREPARE = "TensorParallel.Runtime.Prepare"


@pytest.fixture(scope="module")
def server(tiny_z_image: Path) -> Iterator[ComfyServer]:
    with ComfyServer(env=NO_GPU, settings={PREPARE: "always"}) as server:
        (server.models / "diffusion_models" / MODEL).symlink_to(tiny_z_image)
        yield server


def fork_servers(server: ComfyServer) -> list[psutil.Process]:
    return [child for child in server.children() if is_marked(child, SERVER_MARK)]


def fork_server(server: ComfyServer) -> psutil.Process:
    wait_until(lambda: bool(fork_servers(server)), otherwise="no fork server was started")
    (found,) = fork_servers(server)
    return found


def test_with_comfyui_if_the_settings_say_so(server: ComfyServer) -> None:
    before = fork_server(server)
    server.run(tp_text_to_latent(MODEL))
    assert fork_server(server) == before
    assert {rank.ppid() for rank in server.ranks()} == {before.pid}


def test_by_a_prompt_before_its_nodes_run(server: ComfyServer) -> None:
    """The imports need not wait for what the loader waits for; here it never runs."""
    before = fork_server(server)
    before.kill()
    wait_until(lambda: not before.is_running(), otherwise=f"{before} still runs")
    pattern = node("RegexReplace", string="a", regex_pattern="(", replace="b")
    loader = tp_loader(MODEL, 1)
    loader["inputs"]["devices"] = ["pattern", 0]
    info = node("TPRuntimeInfo", anything=["loader", 0])
    with pytest.raises(PromptError) as caught:
        server.run({"pattern": pattern, "loader": loader, "info": info})
    assert caught.value.node_id == "pattern"
    assert fork_server(server) != before
    assert not server.ranks()


def test_by_a_page_that_shows_a_loader(server: ComfyServer) -> None:
    """It asks which counts the loader's file can have, long before somebody runs the workflow."""
    before = fork_server(server)
    before.kill()
    wait_until(lambda: not before.is_running(), otherwise=f"{before} still runs")
    server.post(f"/tensor_parallel/gpu_counts?unet_name={MODEL}", {})
    assert fork_server(server) != before
    assert not server.ranks()


def test_by_the_loader(tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that no prompt named, or that had to wait in the queue for long."""
    asked: list[str] = []
    with pack_module("nodes.loading") as loading:
        monkeypatch.setattr(loading, "prepare_start", asked.append)
        model = loading.load(None, MODEL, str(tiny_z_image), gpu_count="1")
    assert asked == [model.remote.group_config.python]


@pytest.fixture
def early_start() -> Iterator[ModuleType]:
    with pack_module("nodes.early_start") as module:
        yield module


Started = list[tuple[str, bool]]


@pytest.fixture
def started(early_start: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Started:
    """The Python of each fork server that is asked for, and whether it is kept."""
    asked: Started = []
    monkeypatch.setattr(
        early_start, "prepare_start", lambda python, *, keep: asked.append((python, keep))
    )
    monkeypatch.delenv("TP_RUNTIME_PYTHON", raising=False)
    return asked


@pytest.mark.parametrize(
    ("when", "num_gpus", "expected"),
    [
        ("auto", 0, []),
        ("auto", 1, []),
        ("auto", 2, [(sys.executable, False)]),
        ("always", 0, [(sys.executable, True)]),
        ("when used", 8, []),
    ],
)
def test_when_comfyui_starts(
    early_start: ModuleType,
    started: Started,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
    num_gpus: int,
    expected: Started,
) -> None:
    monkeypatch.setattr(early_start, "prepare_setting", lambda: when)
    monkeypatch.setattr(early_start, "visible_gpu_count", lambda: num_gpus)
    early_start.prepare_with_comfyui()
    assert started == expected


def test_not_in_a_python_without_vllm(
    early_start: ModuleType, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early_start, "find_spec", lambda _: None)
    early_start.prepare()
    assert not started


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        [],
        {"1": None},
        {"1": {"class_type": ["TPLoadDiffusionModel"], "inputs": {}}},
        {"1": {"class_type": "UNETLoader", "inputs": {}}},
        {"1": {"class_type": "TPLoadDiffusionModel"}},
        {"1": {"class_type": "TPLoadDiffusionModel", "inputs": {"where": "ray"}}},
    ],
)
def test_not_for_a_prompt_that_runs_elsewhere(
    early_start: ModuleType, monkeypatch: pytest.MonkeyPatch, prompt: Any
) -> None:
    def start(*_: Any, **__: Any) -> Callable[[], None]:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(early_start.threading, "Thread", start)
    request = {"prompt": prompt}
    assert early_start.prepare_for(request) is request
