"""LoRAs that widen FLUX.1's input (Canny, Depth), over HTTP: as on the stock model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.lora_files import widening, write_flux_control_lora, write_lora
from support.tiny_models import tiny, tiny_shapes, write_tiny
from support.tiny_vae import VAE_NAME, write_tiny_vae
from support.workflows import Prompt, Sampling, node, stock_twin, text_to_latent, tp_loader

pytestmark = pytest.mark.comfy

MODEL, FILL = "widened_flux.safetensors", "widened_fill.safetensors"
CONTROL, PLAIN, OF_INPUT = "control.safetensors", "plain.safetensors", "of_input.safetensors"
PICTURE = "canny.png"

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    models, shapes = comfy_server.models, tiny_shapes("flux")
    write_tiny("flux", models / "diffusion_models" / MODEL)
    write_tiny("flux", models / "diffusion_models" / FILL, in_channels=96)
    write_flux_control_lora(models / "loras" / CONTROL, shapes)
    for seed, (name, layer) in enumerate(
        ((PLAIN, "double_blocks.0.img_attn.qkv"), (OF_INPUT, "img_in"))
    ):
        write_lora(models / "loras" / name, [(layer, shapes[f"{layer}.weight"])], seed=seed)
    write_tiny_vae(models)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / PICTURE)


def prompt_of(
    *chain: tuple[str, float], gpu_count: int = 2, control: bool = True, **settings: Any
) -> Prompt:
    """Of these LoRAs with their strengths, and a control picture."""
    sizes = {"caption_width": tiny("flux").context_dim, "pooled_width": tiny("flux").vector_dim}
    sampling = Sampling(**{"steps": 3, "width": 64, "height": 64} | sizes | settings)
    prompt = text_to_latent(tp_loader(MODEL, gpu_count), sampling=sampling)
    prompt["sampler"]["inputs"]["model"] = _with_loras(prompt, chain)
    if control:
        prompt |= {
            "picture": node("LoadImage", image=PICTURE),
            "vae": node("VAELoader", vae_name=VAE_NAME),
            "control": node(
                "InstructPixToPixConditioning",
                positive=["positive", 0],
                negative=["negative", 0],
                vae=["vae", 0],
                pixels=["picture", 0],
            ),
        }
        prompt["sampler"]["inputs"] |= {
            "positive": ["control", 0],
            "negative": ["control", 1],
            "latent_image": ["control", 2],
        }
    return prompt


def _with_loras(prompt: Prompt, chain: tuple[tuple[str, float], ...]) -> list[Any]:
    model = "model"
    for index, (name, strength) in enumerate(chain):
        prompt[f"lora {index}"] = node(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=name, strength_model=strength
        )
        model = f"lora {index}"
    return [model, 0]


@pytest.mark.rotates(3)
@pytest.mark.parametrize("gpu_count", [1, 2])
@pytest.mark.parametrize(
    "chain",
    [
        [(CONTROL, 1.0)],
        [(CONTROL, 0.5)],
        [(PLAIN, 0.8), (CONTROL, 1.0)],
        [(CONTROL, 1.0), (PLAIN, 0.8), (OF_INPUT, 0.7)],
        [(OF_INPUT, 0.7), (CONTROL, 1.0)],
    ],
    ids=lambda chain: " ".join(name.partition(".")[0] for name, _ in chain),
)
def test_as_in_stock(
    same_as_stock: Compare, chain: list[tuple[str, float]], gpu_count: int
) -> None:
    same_as_stock(prompt_of(*chain, gpu_count=gpu_count))


def test_with_guidance_and_a_batch(same_as_stock: Compare) -> None:
    """And without a control picture: ComfyUI's model then adds zeros."""
    same_as_stock(prompt_of((CONTROL, 1.0), cfg=2.0))
    same_as_stock(prompt_of((CONTROL, 1.0), cfg=2.0, batch_size=2, control=False), 1e-4)


def test_in_turns(comfy_server: ComfyServer, same_as_stock: Compare) -> None:
    """One file with the LoRA and without it, in one prompt and from prompt to prompt."""
    same_as_stock(prompt_of(control=False, seed=21))
    both = prompt_of((CONTROL, 1.0), seed=22)
    second = prompt_of(control=False, seed=23)
    both |= {
        "plain": second["sampler"],
        "plain latent": second["latent"],
        "plain save": node("SaveLatent", samples=["plain", 0], filename_prefix="latents/plain"),
    }
    both["plain"]["inputs"]["latent_image"] = ["plain latent", 0]
    same_as_stock(both)
    for strength in (0.9, 0.3):
        same_as_stock(prompt_of((CONTROL, strength), seed=24))
        comfy_server.post("/free", {"unload_models": True, "free_memory": True})
        same_as_stock(prompt_of((CONTROL, strength), seed=25))
    same_as_stock(prompt_of(control=False, seed=26))


def test_a_hook_cannot_widen(comfy_server: ComfyServer) -> None:
    """ComfyUI's own model fails in the same place, of a copy into a smaller weight."""
    shape = tiny_shapes("flux")["img_in.weight"]
    save_file(widening("img_in", shape), comfy_server.models / "loras" / "hook.safetensors")
    prompt = prompt_of(seed=31) | {
        "hook": node("CreateHookLoraModelOnly", lora_name="hook.safetensors", strength_model=1.0),
        "hooked": node(
            "ConditioningSetProperties",
            cond_NEW=["positive", 0],
            strength=1.0,
            set_cond_area="default",
            hooks=["hook", 0],
        ),
    }
    prompt["sampler"]["inputs"]["positive"] = ["hooked", 0]
    with pytest.raises(PromptError, match="size"):
        comfy_server.run(stock_twin(prompt))
    with pytest.raises(PromptError, match=r"img_in.weight.*LoraLoaderModelOnly"):
        comfy_server.run(prompt)


def test_another_models_lora(comfy_server: ComfyServer) -> None:
    """FLUX.1 Fill takes more channels than the LoRA makes of dev's."""
    prompt = prompt_of((CONTROL, 1.0), seed=41) | {"model": tp_loader(FILL, 2)}
    with pytest.raises(PromptError, match="must be larger"):
        comfy_server.run(stock_twin(prompt))
    with pytest.raises(PromptError, match=r"\[384, 384\].*\[384, 128\].*made for another model"):
        comfy_server.run(prompt)
