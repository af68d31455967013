"""However it is sampled, our MODEL gives what the same nodes give on the native model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.comfy_history import History
from support.comfy_server import ComfyServer
from support.workflows import (
    Prompt,
    Sampling,
    node,
    text_to_latent,
    tp_loader,
    tp_text_to_latent,
)

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(3)]

MODEL = "tiny_z_image.safetensors"
BATCH_TOLERANCE = 1e-4  # a batch of two: the CPU adds up in another order in another process

Compare = Callable[..., History]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(sampler_name="euler", scheduler="simple"),
        Sampling(sampler_name="euler_ancestral", scheduler="normal"),
        Sampling(sampler_name="dpmpp_2m", scheduler="sgm_uniform"),
        Sampling(sampler_name="dpmpp_sde", scheduler="karras"),
        Sampling(sampler_name="uni_pc", scheduler="beta"),
        Sampling(sampler_name="res_multistep", scheduler="ddim_uniform"),
        Sampling(sampler_name="heun", scheduler="linear_quadratic"),
        Sampling(sampler_name="lcm", scheduler="kl_optimal"),
        Sampling(width=120, height=136),
        Sampling(width=40, height=248, caption_length=1),
    ],
    ids=lambda s: f"{s.sampler_name}-{s.scheduler}-{s.width}x{s.height}",
)
def test_tp_sampler(sampling: Sampling, same_as_stock: Compare) -> None:
    same_as_stock(tp_text_to_latent(MODEL, sampling=sampling))


def test_batch_of_two(same_as_stock: Compare) -> None:
    sampling = Sampling(batch_size=2)
    same_as_stock(tp_text_to_latent(MODEL, sampling=sampling), BATCH_TOLERANCE)


def test_guidance_with_prompts_of_equal_length(same_as_stock: Compare) -> None:
    """ComfyUI evaluates both halves in one batch."""
    sampling = Sampling(cfg=2.5)
    same_as_stock(tp_text_to_latent(MODEL, sampling=sampling), BATCH_TOLERANCE)


def test_guidance_with_prompts_of_different_lengths(same_as_stock: Compare) -> None:
    """ComfyUI evaluates the halves one after the other."""
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(cfg=2.5))
    prompt["negative"]["inputs"]["length"] = 40
    same_as_stock(prompt)


def test_stock_ksampler(same_as_stock: Compare) -> None:
    same_as_stock(text_to_latent(tp_loader(MODEL, 2)))


def test_ksampler_advanced_in_two_stages(same_as_stock: Compare) -> None:
    prompt = text_to_latent(tp_loader(MODEL, 2))
    first = _advanced("latent", 0, 2, add_noise="enable", return_with_leftover_noise="enable")
    second = _advanced("first", 2, 10000, add_noise="disable", return_with_leftover_noise="disable")
    same_as_stock(prompt | {"first": first, "sampler": second})


def _advanced(latent: str, start: int, end: int, **switches: str) -> dict[str, Any]:
    return node(
        "KSamplerAdvanced",
        model=["model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=[latent, 0],
        noise_seed=7,
        steps=4,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        start_at_step=start,
        end_at_step=end,
        **switches,
    )


def test_custom_sampler_with_cfg_guider(same_as_stock: Compare) -> None:
    sampling = Sampling(cfg=2.5, sampler_name="dpmpp_2m")
    prompt = text_to_latent(tp_loader(MODEL, 2), "SamplerCustomAdvanced", sampling)
    prompt["negative"]["inputs"]["length"] = 40
    same_as_stock(prompt)


def test_custom_sampler_with_basic_guider(same_as_stock: Compare) -> None:
    prompt = text_to_latent(tp_loader(MODEL, 2), "SamplerCustomAdvanced")
    del prompt["negative"]
    prompt["guider"] = node("BasicGuider", model=["model", 0], conditioning=["positive", 0])
    same_as_stock(prompt)


def test_model_sampling_aura_flow(same_as_stock: Compare) -> None:
    prompt = tp_text_to_latent(MODEL)
    prompt["shifted"] = node("ModelSamplingAuraFlow", model=["model", 0], shift=6.0)
    prompt["sampler"]["inputs"]["model"] = ["shifted", 0]
    same_as_stock(prompt)


@pytest.fixture
def image_to_image(comfy_server: ComfyServer) -> Prompt:
    """A prompt that starts from a latent with something in it."""
    latent = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    comfy_server.put_latent("start.latent", latent)
    prompt = tp_text_to_latent(MODEL, sampling=Sampling(denoise=0.5))
    return prompt | {"latent": node("LoadLatent", latent="start.latent")}


def test_image_to_image(same_as_stock: Compare, image_to_image: Prompt) -> None:
    same_as_stock(image_to_image)


def test_noise_mask(same_as_stock: Compare, image_to_image: Prompt) -> None:
    """Half of the picture is kept."""
    prompt = image_to_image | {
        "nothing": node("SolidMask", value=0.0, width=128, height=128),
        "half": node("SolidMask", value=1.0, width=64, height=128),
        "mask": node(
            "MaskComposite",
            destination=["nothing", 0],
            source=["half", 0],
            x=0,
            y=0,
            operation="add",
        ),
        "masked": node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0]),
    }
    prompt["sampler"]["inputs"]["latent_image"] = ["masked", 0]
    same_as_stock(prompt)
