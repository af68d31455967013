"""`where=ray` in ComfyUI: a group on a Ray of this machine, and a clear error where none is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.comfy_history import PromptError
from support.comfy_server import NO_GPU, ComfyServer
from support.group_reports import rank_pids
from support.leaks import nothing_left_over
from support.ray_leaks import no_ray_left_over
from support.workflows import on_gpus_of, text_to_latent, tp_loader, with_report

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(5, "ray")]

NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def model_file(tiny_z_image: Path) -> str:
    return tiny_z_image.name


def server_with(tiny_z_image: Path, **env: str) -> ComfyServer:
    server = ComfyServer(env={**NO_GPU, **env})
    (server.models / "diffusion_models" / tiny_z_image.name).symlink_to(tiny_z_image)
    return server


@pytest.fixture
def lost_server(tiny_z_image: Path) -> Iterator[ComfyServer]:
    """One whose cluster is not there."""
    with nothing_left_over(), no_ray_left_over():
        with server_with(tiny_z_image, TP_RUNTIME_RAY_ADDRESS=NOBODY) as server:
            yield server


def test_a_prompt(tiny_z_image: Path, model_file: str) -> None:
    """The same workflow on both; nothing is left of Ray."""
    prompt = with_report(text_to_latent(tp_loader(model_file, 2), "TPSampler"))
    with nothing_left_over(), no_ray_left_over(), server_with(tiny_z_image) as server:
        here = server.run(prompt)
        there = server.run(on_gpus_of("ray", prompt))
        assert len(rank_pids(here)) == 2
        assert torch.equal(server.latent(here), server.latent(there))


def test_there_is_no_cluster(lost_server: ComfyServer, model_file: str) -> None:
    """The error says so, and the workflow runs where it says `this machine`."""
    prompt = text_to_latent(tp_loader(model_file, 1), "TPSampler")
    with pytest.raises(PromptError, match=f"There is no Ray cluster at {NOBODY}"):
        lost_server.run(on_gpus_of("ray", prompt))
    lost_server.run(prompt)
