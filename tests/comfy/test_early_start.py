"""What the GPU processes are forked from is started before a sampler needs them."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.comfy_server import NO_GPU, ComfyServer
from support.leaks import SERVER_MARK, is_marked
from support.waiting import wait_until
from support.workflows import node, tp_loader, tp_text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
KEEP_READY = "TensorParallel.Runtime.KeepReady"


@pytest.fixture(scope="module")
def server(tiny_z_image: Path) -> Iterator[ComfyServer]:
    with ComfyServer(env=NO_GPU, settings={KEEP_READY: True}) as server:
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


def test_by_the_loader(server: ComfyServer) -> None:
    before = fork_server(server)
    before.kill()
    wait_until(lambda: not before.is_running(), otherwise=f"{before} still runs")
    prompt = {"loader": tp_loader(MODEL, 1), "info": node("TPRuntimeInfo", anything=["loader", 0])}
    server.run(prompt)
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
