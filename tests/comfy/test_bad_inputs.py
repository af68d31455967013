"""Latents and prompts that no model can use: one clear error of the sampler, the ranks stay."""

from collections.abc import Callable

import pytest
import torch

from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.workflows import Prompt, Sampling, node, tp_text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"

Works = Callable[[], list[int]]
Refused = Callable[[Prompt], str]


@pytest.fixture
def refused(comfy_server: ComfyServer, works: Works) -> Refused:
    """`refused(prompt)`: the sampler's message; the ranks are the same before and after."""

    def check(prompt: Prompt) -> str:
        pids = works()
        with pytest.raises(PromptError) as error:
            comfy_server.run(prompt)
        print(f"{error.value.type}: {error.value.message}")
        assert error.value.node_id == "sampler"
        assert error.value.type.endswith("InputError")
        assert works() == pids
        return error.value.message

    return check


def test_nan_latent(refused: Refused) -> None:
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(denoise=0.5))
    prompt["broken"] = node("TPTestNaNLatent", samples=["latent", 0])
    prompt["sampler"]["inputs"]["latent_image"] = ["broken", 0]
    message = refused(prompt)
    assert "1 of the 4096 values of the latent are NaN" in message


@pytest.mark.parametrize("width", [63, 128, 2560])
def test_caption_of_another_width(refused: Refused, width: int) -> None:
    message = refused(tp_text_to_latent(MODEL, sampling=Sampling(caption_width=width)))
    assert str(width) in message
    assert "64" in message


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (1, 32, 16, 16)], ids=str)
def test_latent_of_another_model(
    comfy_server: ComfyServer, refused: Refused, shape: tuple[int, ...]
) -> None:
    name = f"{shape[1]}-channels.latent"
    comfy_server.put_latent(name, torch.ones(shape))
    prompt = tp_text_to_latent(MODEL) | {"latent": node("LoadLatent", latent=name)}
    message = refused(prompt)
    assert str(shape[1]) in message
    assert "16" in message
