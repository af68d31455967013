"""A page sees our samplers work as it sees the stock one."""

from typing import Any

import pytest

from support.comfy_server import ComfyServer
from support.tiny_models import write_tiny
from support.workflows import Prompt, Sampling, node, stock_twin, text_to_latent, tp_loader

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"
SAMPLING = Sampling(seed=31, steps=5)


@pytest.mark.parametrize("sampler", ["TPSampler", "SamplerCustomAdvanced"])
def test_progress_and_previews_are_those_of_stock(comfy_server: ComfyServer, sampler: Any) -> None:
    prompt = text_to_latent(tp_loader(MODEL, 2), sampler, SAMPLING)
    assert _seen(comfy_server, prompt) == _seen(comfy_server, stock_twin(prompt))


def _seen(server: ComfyServer, prompt: Prompt) -> tuple[list[tuple[str, int]], int]:
    """The progress of the sampling, and the number of previews."""
    server.events.clear()
    server.run(prompt)
    progress = [event.data for event in server.events.all("progress")]
    steps = [(data["node"], data["value"]) for data in progress if data["max"] == SAMPLING.steps]
    assert [value for _, value in steps[-2:]] == [SAMPLING.steps - 1, SAMPLING.steps]
    previews = server.events.all("preview")
    assert previews
    assert all(event.image for event in previews)
    return steps, len(previews)


def test_loading_shows_progress(comfy_server: ComfyServer) -> None:
    name = "fresh_z_image.safetensors"
    write_tiny("z_image", comfy_server.models / "diffusion_models" / name)
    comfy_server.events.clear()
    comfy_server.run(text_to_latent(tp_loader(name, 2), "TPSampler", SAMPLING))
    loading = [event.data for event in comfy_server.events.all("progress")]
    loading = [data for data in loading if data["max"] != SAMPLING.steps]
    assert loading
    assert {data["node"] for data in loading} == {"sampler"}
    assert loading[-1]["value"] == loading[-1]["max"]


def test_cpu_ranks_are_announced_on_the_node(comfy_server: ComfyServer) -> None:
    comfy_server.run({"report": node("TPRuntimeInfo")})  # ComfyUI forgets that the loader ran
    comfy_server.events.clear()
    comfy_server.run(text_to_latent(tp_loader(MODEL, 2), "TPSampler", SAMPLING))
    (started,) = comfy_server.events.all("execution_start")
    taken_back, message = [
        event.data for event in comfy_server.events.all("tensor_parallel.warning")
    ]
    of_node = {"node": "model", "prompt": started.data["prompt_id"]}
    assert taken_back == of_node | {"text": ""}  # what an earlier run said
    assert message.items() >= of_node.items()
    assert "No CUDA GPU is visible" in message["text"]
    assert "2 CPU processes" in message["text"]
