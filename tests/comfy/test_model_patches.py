"""ControlNets that are model patches, over HTTP: on our MODEL as on the stock one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.group_reports import group
from support.tiny_models import write_tiny
from support.tiny_vae import VAE_NAME, WAN_VAE_NAME, write_tiny_vae, write_tiny_wan_vae
from support.workflows import Prompt, Sampling, node, text_to_latent, tp_loader, with_report
from support.z_image_controls import is_known, write_model

pytestmark = pytest.mark.comfy

MODEL = "patched_qwen_image.safetensors"
PICTURE = "patched.png"
Z_IMAGE = "patched_z_image.safetensors"
PATCH = "QwenImageBlockWiseControlNet"

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    write_tiny("qwen_image", comfy_server.models / "diffusion_models" / MODEL)
    write_model(comfy_server.models / "diffusion_models" / Z_IMAGE)
    write_tiny_vae(comfy_server.models)
    write_tiny_wan_vae(comfy_server.models)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (96, 64, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / PICTURE)


def controlled(prompt: Prompt, *patches: dict[str, Any], sampler: str = "sampler") -> Prompt:
    """The same prompt with a node for each of the patches: inputs of the test's node and of it."""
    prompt = {name: {**of, "inputs": dict(of["inputs"])} for name, of in prompt.items()}
    prompt["picture"] = node("LoadImage", image=PICTURE)
    prompt["mask"] = node("LoadImageMask", image=PICTURE, channel="red")
    prompt["vae"] = node("VAELoader", vae_name=WAN_VAE_NAME)
    model = prompt[sampler]["inputs"]["model"][0]
    for index, patch in enumerate(patches):
        masked = patch.get("masked", 0)
        prompt[f"patch {index}"] = node("TPTestModelPatches", seed=index, masked=masked)
        prompt[f"apply {index}"] = node(
            "QwenImageDiffsynthControlnet",
            model=[model, 0],
            model_patch=[f"patch {index}", 0],
            vae=["vae", 0],
            image=["picture", 0],
            strength=patch.get("strength", 1.0),
            **({"mask": ["mask", 0]} if masked else {}),
        )
        model = f"apply {index}"
    prompt[sampler]["inputs"]["model"] = [model, 0]
    return prompt


def tp_prompt(**settings: Any) -> Prompt:
    sampling = Sampling(**{"steps": 3, "width": 64, "height": 96, "cfg": 2.5} | settings)
    return text_to_latent(tp_loader(MODEL, 2), sampling=sampling)


@pytest.mark.parametrize(
    ("patches", "settings"),
    [
        ([{}], {}),
        ([{"strength": -0.4}], {"cfg": 1.0}),
        ([{}], {"width": 96, "height": 80}),  # ComfyUI encodes the picture anew
        ([{}], {"batch_size": 2}),
        ([{"masked": 1}], {}),
        ([{"strength": 0.5}, {"strength": 1.5, "masked": 1}], {}),
    ],
    ids=["one", "strength", "another size", "batch", "mask", "two"],
)
def test_as_in_stock(
    comfy_server: ComfyServer,
    same_as_stock: Compare,
    patches: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    plain = tp_prompt(**settings)
    found = comfy_server.latent(same_as_stock(controlled(plain, *patches)))
    assert not found.allclose(comfy_server.latent(comfy_server.run(plain)), atol=0.01)


def test_two_samplers_of_different_sizes(same_as_stock: Compare) -> None:
    """Each evaluation has the picture in the size of its own latent."""
    prompt = tp_prompt(seed=31)
    larger = tp_prompt(seed=32, width=96)
    prompt |= {"larger latent": larger["latent"], "larger": larger["sampler"]}
    prompt["larger"]["inputs"]["latent_image"] = ["larger latent", 0]
    prompt["larger save"] = node("SaveLatent", samples=["larger", 0], filename_prefix="latents/l")
    prompt = controlled(prompt, {})
    prompt["larger"]["inputs"]["model"] = prompt["sampler"]["inputs"]["model"]
    same_as_stock(prompt)


def test_it_goes_when_no_prompt_uses_it(comfy_server: ComfyServer) -> None:
    """The ranks hold a patch for as long as ComfyUI does."""
    with_patch = with_report(controlled(tp_prompt(seed=41), {"strength": 0.9}))
    held = group(comfy_server.run(with_patch))["ranks"][0]["models"]
    assert len([name for name in held if name.startswith(PATCH)]) >= 1

    def is_gone() -> bool:
        held = group(comfy_server.run(with_report(tp_prompt(seed=42))))["ranks"][0]["models"]
        return not [name for name in held if name.startswith(PATCH)]

    comfy_server.free_until(is_gone)


def test_after_a_cancel(comfy_server: ComfyServer, same_as_stock: Compare) -> None:
    prompt = controlled(tp_prompt(steps=2000, seed=51), {"strength": 0.8})
    comfy_server.events.clear()
    prompt_id = comfy_server.queue(prompt)
    comfy_server.events.wait_for("progress", lambda event: event.data["value"] >= 2)
    comfy_server.interrupt()
    with pytest.raises(PromptError) as error:
        comfy_server.wait(prompt_id, timeout_s=30)
    assert error.value.type == "interrupted"
    same_as_stock(controlled(tp_prompt(seed=52), {"strength": 0.8}))


def test_a_patch_on_a_model_that_takes_none(comfy_server: ComfyServer) -> None:
    """ComfyUI's code is named, and nothing is computed."""
    write_tiny("flux", comfy_server.models / "diffusion_models" / "patched_flux.safetensors")
    prompt = text_to_latent(
        tp_loader("patched_flux.safetensors", 2),
        sampling=Sampling(steps=2, width=64, height=96, pooled_width=64),
    )
    with pytest.raises(PromptError, match=r"DiffSynthCnetPatch.* called in the model's blocks"):
        comfy_server.run(controlled(prompt, {}))


# Only newer releases of ComfyUI have these.


def with_union(prompt: Prompt, *controls: dict[str, Any]) -> Prompt:
    """The prompt with Z-Image's ControlNets: inputs of the test's node, and of ComfyUI's."""
    prompt = {name: {**of, "inputs": dict(of["inputs"])} for name, of in prompt.items()}
    prompt["picture"] = node("LoadImage", image=PICTURE)
    prompt["mask"] = node("LoadImageMask", image=PICTURE, channel="red")
    prompt["vae"] = node("VAELoader", vae_name=VAE_NAME)
    model = "model"
    for index, control in enumerate(controls):
        inputs = dict(control)
        of_patch = {name: inputs.pop(name) for name in ("union_layers", "masked")}
        prompt[f"patch {index}"] = node("TPTestModelPatches", seed=index, **of_patch)
        prompt[f"apply {index}"] = node(
            "ZImageFunControlnet",
            **{"strength": 1.0, "model": [model, 0], "vae": ["vae", 0]} | inputs,
            model_patch=[f"patch {index}", 0],
        )
        model = f"apply {index}"
    prompt["sampler"]["inputs"]["model"] = [model, 0]
    return prompt


IMAGE, INPAINT = {"image": ["picture", 0]}, {"inpaint_image": ["picture", 0], "mask": ["mask", 0]}
OF_1, OF_2 = {"union_layers": 6, "masked": 0}, {"union_layers": 15, "masked": 1}


@pytest.mark.skipif(not is_known(), reason="this ComfyUI has no such ControlNets")
@pytest.mark.parametrize(
    ("controls", "settings"),
    [
        ([OF_1 | IMAGE], {}),
        ([OF_1 | IMAGE | {"strength": 0.4}], {"width": 96, "height": 80, "cfg": 1.0}),
        ([OF_2 | IMAGE | INPAINT], {"batch_size": 2}),
        ([OF_2 | INPAINT, OF_1 | IMAGE | {"strength": 0.7}], {}),
    ],
    ids=["one", "strength and another size", "inpainting, batch", "two"],
)
def test_z_image_as_in_stock(
    comfy_server: ComfyServer,
    same_as_stock: Compare,
    controls: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    sampling = Sampling(**{"steps": 2, "width": 64, "height": 96, "cfg": 2.5} | settings)
    plain = text_to_latent(tp_loader(Z_IMAGE, 2), sampling=sampling)
    found = comfy_server.latent(same_as_stock(with_union(plain, *controls)))
    assert not found.allclose(comfy_server.latent(comfy_server.run(plain)), atol=0.01)
