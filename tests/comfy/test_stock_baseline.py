"""The reference itself: stock nodes on the tiny checkpoint, in a real ComfyUI over HTTP."""

import pytest
import torch

from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.workflows import Sampling, stock_loader, text_to_latent

pytestmark = pytest.mark.comfy

MODEL = "tiny_z_image.safetensors"


def test_stock_sampler_is_repeatable(comfy_server: ComfyServer) -> None:
    comfy_server.events.clear()
    first = comfy_server.latent(comfy_server.run(text_to_latent(stock_loader(MODEL))))
    assert first.shape == (1, 16, 16, 16)
    assert first.isfinite().all()
    assert 0.3 < first.std() < 30

    progress = [event.data["value"] for event in comfy_server.events.all("progress")]
    assert progress == sorted(progress)
    assert progress[-1] == Sampling().steps
    assert len(comfy_server.events.all("preview")) == Sampling().steps

    # ComfyUI keeps results of unchanged nodes: drop them, so that the sampler runs again.
    comfy_server.post("/free", {"unload_models": True, "free_memory": True})
    second = comfy_server.latent(comfy_server.run(text_to_latent(stock_loader(MODEL))))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_tiny_checkpoint_samples_as_z_image(comfy_server: ComfyServer) -> None:
    """Shift 3 is Z-Image's: saying so explicitly changes nothing, another shift does."""
    stock = text_to_latent(stock_loader(MODEL), "SamplerCustomAdvanced")
    expected = comfy_server.latent(comfy_server.run(stock))
    for shift, same in ((3.0, True), (6.0, False)):
        prompt = text_to_latent(stock_loader(MODEL), "SamplerCustomAdvanced")
        prompt["shifted"] = {
            "class_type": "ModelSamplingAuraFlow",
            "inputs": {"model": ["model", 0], "shift": shift},
        }
        prompt["guider"]["inputs"]["model"] = ["shifted", 0]
        prompt["schedule"]["inputs"]["model"] = ["shifted", 0]
        latent = comfy_server.latent(comfy_server.run(prompt))
        assert torch.equal(latent, expected) == same


def test_caption_and_seed_change_the_latent(comfy_server: ComfyServer) -> None:
    prompt = text_to_latent(stock_loader(MODEL), sampling=Sampling(cfg=2.5, batch_size=2))
    base = comfy_server.latent(comfy_server.run(prompt))
    assert base.shape == (2, 16, 16, 16)
    prompt["negative"]["inputs"]["seed"] = 3
    other_caption = comfy_server.latent(comfy_server.run(prompt))
    prompt["sampler"]["inputs"]["seed"] = 8
    other_seed = comfy_server.latent(comfy_server.run(prompt))
    assert not torch.allclose(base, other_caption, atol=1e-2)
    assert not torch.allclose(other_caption, other_seed, atol=1e-2)


def test_errors_name_their_node(comfy_server: ComfyServer) -> None:
    refused = text_to_latent(stock_loader("no such file.safetensors"))
    with pytest.raises(PromptError, match="not in list") as validation:
        comfy_server.run(refused)
    assert validation.value.node_id == "model"

    failing = text_to_latent(stock_loader(MODEL), sampling=Sampling(caption_width=63))
    with pytest.raises(PromptError) as execution:
        comfy_server.run(failing)
    assert execution.value.node_id == "sampler"
    assert execution.value.type == "RuntimeError"


def test_interrupt_ends_the_prompt(comfy_server: ComfyServer) -> None:
    comfy_server.events.clear()
    long_run = text_to_latent(stock_loader(MODEL), sampling=Sampling(steps=2000))
    prompt_id = comfy_server.queue(long_run)
    comfy_server.events.wait_for("progress")
    comfy_server.interrupt()
    with pytest.raises(PromptError) as interrupted:
        comfy_server.wait(prompt_id, timeout_s=30)
    assert interrupted.value.type == "interrupted"
