"""USO's style references on FLUX.1, over HTTP: as on the stock model."""

from collections.abc import Callable
from typing import Any

import pytest

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.tiny_models import tiny, write_tiny
from support.workflows import Prompt, Sampling, node, stock_twin, text_to_latent, tp_loader

pytestmark = pytest.mark.comfy

MODEL, NARROW = "styled_flux.safetensors", "styled_narrow.safetensors"

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    folder = comfy_server.models / "diffusion_models"
    write_tiny("flux", folder / MODEL)
    write_tiny("flux", folder / NARROW, num_heads=12)


def styled(*seeds: int, model: str = MODEL, **settings: Any) -> Prompt:
    """With a style reference for each seed, which its projector is made from."""
    sizes = {"caption_width": tiny("flux").context_dim, "pooled_width": tiny("flux").vector_dim}
    sampling = Sampling(**{"steps": 3, "width": 64, "height": 64} | sizes | settings)
    prompt = text_to_latent(tp_loader(model, 2), sampling=sampling)
    last = "model"
    for seed in seeds:
        prompt[f"patch {seed}"] = node("TPTestModelPatches", seed=seed)
        prompt[f"style {seed}"] = node(
            "USOStyleReference",
            model=[last, 0],
            model_patch=[f"patch {seed}", 1],
            clip_vision_output=[f"patch {seed}", 2],
        )
        last = f"style {seed}"
    prompt["sampler"]["inputs"]["model"] = [last, 0]
    return prompt


def test_as_in_stock(comfy_server: ComfyServer, same_as_stock: Compare) -> None:
    """None, one, another, two: each changes the picture."""
    found = [
        comfy_server.latent(same_as_stock(styled(*seeds))) for seeds in ((), (1,), (2,), (1, 2))
    ]
    for index, latent in enumerate(found):
        assert not any(latent.allclose(other, atol=0.01) for other in found[:index])


def test_with_guidance_it_fails_in_comfyui(comfy_server: ComfyServer) -> None:
    """Whose object puts the tokens of one picture before the texts of two conditions."""
    with pytest.raises(PromptError, match="must match"):
        comfy_server.run(stock_twin(styled(1, cfg=2.0, seed=3)))
    with pytest.raises(PromptError, match="2 latents need as many style tokens; got 1"):
        comfy_server.run(styled(1, cfg=2.0, seed=3))


def test_a_projector_of_another_width(comfy_server: ComfyServer) -> None:
    with pytest.raises(PromptError, match=r"width 192.*got \(1, 12, 384\).*projector"):
        comfy_server.run(styled(1, model=NARROW))
