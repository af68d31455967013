"""The official graph of FLUX.2 over HTTP, with only the loader swapped, and what it refuses.

Source: ComfyUI's template `image_flux2_fp8` (comfyui-workflow-templates 0.7.25), node by node; its
files are tiny here, under the same names.
"""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.template_models import write_flux2_template_models
from support.tiny_models import tiny
from support.workflows import Prompt, node, tp_loader

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(5)]

MODEL = "flux2_dev_fp8mixed.safetensors"
BATCH_TOLERANCE = 1e-4
PICTURES = {"first.png": (96, 64), "second.png": (48, 80)}

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    write_flux2_template_models(comfy_server.models)
    generator = torch.Generator().manual_seed(0)
    for name, (width, height) in PICTURES.items():
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / name)


def graph(references: int = 2, batch_size: int = 1) -> Prompt:
    """The template's, with so many `ReferenceLatent` nodes behind one another."""
    size = {"width": 128, "height": 128}
    encoder = "mistral_3_small_flux2_fp8.safetensors"
    prompt = {
        "model": tp_loader(MODEL, 2),
        "clip": node("CLIPLoader", clip_name=encoder, type="flux2", device="default"),
        "vae": node("VAELoader", vae_name="flux2-vae.safetensors"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text="Apply the design to the objects"),
        "guidance": node("FluxGuidance", conditioning=["text", 0], guidance=4.0),
        "latent": node("EmptyFlux2LatentImage", batch_size=batch_size, **size),
        "schedule": node("Flux2Scheduler", steps=3, **size),
        "method": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=7),
    }
    conditioning = "guidance"
    for index in range(references):
        picture = list(PICTURES)[index % len(PICTURES)]
        prompt |= {
            f"picture {index}": node("LoadImage", image=picture),
            f"scaled {index}": node(
                "ImageScaleToTotalPixels",
                image=[f"picture {index}", 0],
                upscale_method="area",
                megapixels=0.01,
                resolution_steps=1,  # of newer releases
            ),
            f"encoded {index}": node("VAEEncode", pixels=[f"scaled {index}", 0], vae=["vae", 0]),
            f"reference {index}": node(
                "ReferenceLatent", conditioning=[conditioning, 0], latent=[f"encoded {index}", 0]
            ),
        }
        conditioning = f"reference {index}"
    return prompt | {
        "guider": node("BasicGuider", model=["model", 0], conditioning=[conditioning, 0]),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["method", 0],
            sigmas=["schedule", 0],
            latent_image=["latent", 0],
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "shown": node("SaveImage", images=["decoded", 0], filename_prefix="Flux2"),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test"),
    }


@pytest.mark.parametrize("references", [0, 2, 10])
def test_the_official_graph(same_as_stock: Compare, references: int) -> None:
    same_as_stock(graph(references))


def test_a_batch_with_references(same_as_stock: Compare) -> None:
    """ComfyUI gives every latent of the batch the same references."""
    same_as_stock(graph(batch_size=2), BATCH_TOLERANCE)


def _kohya(path: str) -> tuple[str, str, str]:
    return f"lora_unet_{path.replace('.', '_')}", "lora_up", "lora_down"


def _ai_toolkit(path: str) -> tuple[str, str, str]:
    return f"diffusion_model.{path}", "lora_B", "lora_A"


def _diffusers(path: str) -> tuple[str, str, str]:
    return f"transformer.{path}", "lora_B", "lora_A"


WIDTH = tiny("flux2").dim
IN_THE_FILE = {
    "double_blocks.0.img_attn.qkv": (3 * WIDTH, WIDTH),
    "double_blocks.1.txt_mlp.2": (WIDTH, 3 * WIDTH),
    "single_blocks.0.linear1": (9 * WIDTH, WIDTH),
    "single_stream_modulation.lin": (3 * WIDTH, WIDTH),
}
# ComfyUI 0.3.75 maps those of FLUX.1's names that FLUX.2 has, too.
IN_DIFFUSERS = {
    "transformer_blocks.0.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.1.attn.add_v_proj": (WIDTH, WIDTH),
    "transformer_blocks.0.attn.to_out.0": (WIDTH, WIDTH),
    "single_transformer_blocks.1.attn.to_q": (WIDTH, WIDTH),
    "proj_out": (128, WIDTH),
}


@pytest.mark.parametrize(
    ("style", "layers"),
    [(_kohya, IN_THE_FILE), (_ai_toolkit, IN_THE_FILE), (_diffusers, IN_DIFFUSERS)],
)
def test_lora(
    comfy_server: ComfyServer,
    same_as_stock: Compare,
    style: Callable[[str], tuple[str, str, str]],
    layers: dict[str, tuple[int, int]],
) -> None:
    """Under the names that each trainer gives its tensors."""
    name = f"flux2{style.__name__}.safetensors"
    generator = torch.Generator().manual_seed(len(layers))
    tensors = {}
    for path, (rows, columns) in layers.items():
        prefix, up, down = style(path)
        tensors[f"{prefix}.{up}.weight"] = torch.randn(rows, 4, generator=generator)
        factor = 0.3 * torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"{prefix}.{down}.weight"] = factor
    (comfy_server.models / "loras").mkdir(exist_ok=True)
    save_file(tensors, comfy_server.models / "loras" / name)
    plain, patched = graph(0), graph(0)
    patched["lora"] = node(
        "LoraLoaderModelOnly", model=["model", 0], lora_name=name, strength_model=0.9
    )
    patched["guider"]["inputs"]["model"] = ["lora", 0]
    without = comfy_server.latent(comfy_server.run(plain))
    changed = comfy_server.latent(same_as_stock(patched))
    assert (changed - without).abs().max() > 1e-2 * without.std()


def refused(server: ComfyServer, prompt: Prompt) -> str:
    with pytest.raises(PromptError) as error:
        server.run(prompt)
    print(f"{error.value.type}: {error.value.message}")
    assert error.value.node_id == "sampler"
    assert error.value.type.endswith("InputError")
    return error.value.message


def test_the_text_encoder_of_another_model(comfy_server: ComfyServer) -> None:
    caption = node("TPTestConditioning", seed=1, length=20, width=63, batch=1)
    prompt = graph(0) | {"text": caption}
    message = refused(comfy_server, prompt)
    assert "Captions of FLUX.2 have the shape (batch, tokens, width 64)" in message
    assert "Use the text encoder that belongs to the model." in message


def test_latents_of_another_model(comfy_server: ComfyServer) -> None:
    comfy_server.put_latent("flux1.latent", torch.ones(1, 16, 16, 16))
    message = refused(
        comfy_server, graph(0) | {"latent": node("LoadLatent", latent="flux1.latent")}
    )
    assert "(batch, 128, height, width); got (1, 16, 16, 16)" in message


def test_references_of_another_model(comfy_server: ComfyServer) -> None:
    comfy_server.put_latent("flux1.latent", torch.ones(1, 16, 16, 16))
    prompt = graph(1) | {"encoded 0": node("LoadLatent", latent="flux1.latent")}
    message = refused(comfy_server, prompt)
    assert "Reference latents of FLUX.2 have the shape (batch, 128, rows, columns)" in message


def test_too_many_references(comfy_server: ComfyServer) -> None:
    message = refused(comfy_server, graph(11))
    assert "FLUX.2 takes up to 10 reference latents; got 11." in message
