"""A ComfyUI that keeps nothing between prompts, with a sampler that reads values at every step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy.conftest import ADAPTIVE_TOLERANCE, largest_difference

from support.comfy_server import NO_GPU, ComfyServer
from support.group_reports import rank_pids
from support.workflows import (
    Prompt,
    Sampling,
    node,
    stock_twin,
    text_to_latent,
    tp_loader,
    with_report,
)

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(2, "servers of their own")]

MODEL = "tiny_z_image.safetensors"


@pytest.fixture(scope="module")
def server(tiny_z_image: Path) -> Iterator[ComfyServer]:
    with ComfyServer(env=NO_GPU, extra_args=("--cpu", "--cache-none")) as server:
        (server.models / "diffusion_models" / MODEL).symlink_to(tiny_z_image)
        yield server


def adaptive(seed: int) -> Prompt:
    """dpm_adaptive decides by values how long its next step is. With previews (latent2rgb)."""
    sampling = Sampling(sampler_name="dpm_adaptive", seed=seed)
    return with_report(text_to_latent(tp_loader(MODEL, 2), "SamplerCustomAdvanced", sampling))


def test_prompts_are_as_stock_and_the_group_stays(server: ComfyServer, everything: bool) -> None:
    ranks = set()
    for seed in (1, 2):
        prompt = adaptive(seed)
        shown = len(server.events.all("preview"))
        history = server.run(prompt)
        assert not history.cached
        assert len(server.events.all("preview")) > shown
        ranks.add(tuple(rank_pids(history)))
        if seed == 2 or everything:  # of stock, one is enough each time
            expected = server.latent(server.run(stock_twin(prompt)))
            assert largest_difference(server.latent(history), expected) <= ADAPTIVE_TOLERANCE
    assert len(ranks) == 1


def test_two_samplers_of_one_loader(server: ComfyServer) -> None:
    """Nothing is kept, and yet the second gets what the loader gave."""
    prompt = text_to_latent(tp_loader(MODEL, 2), sampling=Sampling(seed=3))
    prompt["second"] = node("KSampler", **prompt["sampler"]["inputs"] | {"seed": 4})
    prompt["save_second"] = node(
        "SaveLatent", samples=["second", 0], filename_prefix="latents/second"
    )
    expected = server.latents(server.run(stock_twin(prompt)))
    found = server.latents(server.run(prompt))
    assert found.keys() == expected.keys() == {"save", "save_second"}
    for name, latent in expected.items():
        assert largest_difference(found[name], latent) <= 1e-5
