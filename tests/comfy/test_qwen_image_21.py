"""The official graphs of Qwen-Image-2.1 over HTTP, with only the loader swapped; what is refused.

Source: ComfyUI's templates `image_qwen_image_2_1_t2i`, `…_image_edit` and `…_turbo_t2i`
(comfyui-workflow-templates-json 0.1.123), node by node, without the prompt enhancer; their files
are tiny here, under the same names. They need a ComfyUI that has the model's class.
"""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.native import native_families
from support.template_models import write_text_encoder
from support.tiny_models import tiny, write_tiny
from support.workflows import Prompt, node, tp_loader

FAMILY = "qwen_image_21"
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.rotates(2),
    pytest.mark.skipif(FAMILY not in native_families(), reason="this ComfyUI has no class for it"),
]

MODEL = "qwen_image_2.1_bf16.safetensors"
ENCODER = "qwen3vl_8b_int8_convrot.safetensors"
BATCH_TOLERANCE = 1e-4
PICTURES = ("first.png", "second.png")
TURBO_SIGMAS = "1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0"

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    write_tiny(FAMILY, comfy_server.models / "diffusion_models" / MODEL)
    write_text_encoder(
        comfy_server.models / "text_encoders" / ENCODER, f"{tiny(FAMILY).context_dim}"
    )
    generator = torch.Generator().manual_seed(0)
    for name, (width, height) in zip(PICTURES, ((96, 64), (48, 80)), strict=True):
        pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(comfy_server.base / "input" / name)


def text_to_image(**sampling: object) -> Prompt:
    """The template's, whose latent is of another model's channels and empty."""
    size = {"width": 128, "height": 128, "batch_size": 1}
    values = {"steps": 3, "cfg": 1.0, "seed": 7, "denoise": 1.0} | sampling
    return {
        "model": tp_loader(MODEL, 2),
        "clip": node("CLIPLoader", clip_name=ENCODER, type="qwen_image", device="default"),
        "cache": node("QwenImage21Cache", model=["model", 0], device="auto", dtype="default"),
        "text": node(
            "TextEncodeQwenImage21",
            clip=["clip", 0],
            prompt="a portrait in hard light",
            negative_prompt="blurred",
            resolution=1024,
        ),
        "latent": node("EmptyLatentImage", **size),
        "sampler": node(
            "KSampler",
            model=["cache", 0],
            positive=["text", 0],
            negative=["text", 1],
            latent_image=["latent", 0],
            sampler_name="euler",
            scheduler="simple",
            **values,
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test"),
    }


def image_edit(references: int = 2, **sampling: object) -> Prompt:
    """With so many pictures, between the tokens of the text."""
    prompt = text_to_image(**sampling)
    prompt["vae"] = node("TPTestVAE", channels=64, video=False)
    inputs = prompt["text"]["inputs"]
    inputs |= {"vae": ["vae", 0], "resolution": 96}
    for index in range(references):
        name = f"picture {index}"
        prompt[name] = node("LoadImage", image=PICTURES[index % len(PICTURES)])
        inputs[f"images.image_{index + 1}"] = [name, 0]
    prompt["sampler"]["inputs"]["latent_image"] = ["text", 2]
    return prompt


def turbo(references: int = 0) -> Prompt:
    """The turbo templates': eight steps of fixed sigmas."""
    prompt = image_edit(references) if references else text_to_image()
    del prompt["sampler"]
    latent = ["text", 2] if references else ["latent", 0]
    captions = {"positive": ["text", 0], "negative": ["text", 1]}
    return prompt | {
        "sigmas": node("ManualSigmas", sigmas=TURBO_SIGMAS),
        "method": node("KSamplerSelect", sampler_name="euler"),
        "noise": node("RandomNoise", noise_seed=7),
        "guider": node("CFGGuider", model=["cache", 0], cfg=1.0, **captions),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["method", 0],
            sigmas=["sigmas", 0],
            latent_image=latent,
        ),
    }


@pytest.mark.parametrize(
    "prompt",
    [text_to_image(), image_edit(), image_edit(10), turbo(), turbo(1)],
    ids=["text to image", "edit", "ten pictures", "turbo", "turbo edit"],
)
def test_the_official_graph(same_as_stock: Compare, prompt: Prompt) -> None:
    same_as_stock(prompt)


@pytest.mark.parametrize("cache", [("off", "default"), ("cpu", "int4")])
def test_guidance_whatever_the_cache(same_as_stock: Compare, cache: tuple[str, str]) -> None:
    """The node for ComfyUI's cache of the prefix changes nothing: the ranks have their own."""
    prompt = image_edit(cfg=4.0)
    prompt["cache"]["inputs"] |= {"device": cache[0], "dtype": cache[1]}
    same_as_stock(prompt, BATCH_TOLERANCE)


def test_a_second_run_with_another_picture(
    comfy_server: ComfyServer, same_as_stock: Compare
) -> None:
    """Nothing that is remembered of a prompt is taken for another one."""
    first = comfy_server.latent(same_as_stock(image_edit(1)))
    prompt = image_edit(1)
    prompt["picture 0"]["inputs"]["image"] = PICTURES[1]
    prompt["text"]["inputs"]["resolution"] = 96
    second = comfy_server.latent(same_as_stock(prompt))
    assert first.shape != second.shape or (first - second).abs().max() > 1e-2 * first.std()


WIDTH = tiny(FAMILY).dim
LAYERS = {
    "transformer_blocks.0.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.1.attn.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.1.img_mlp.out": (WIDTH, 3 * WIDTH),
    "txt_in.in_layer": (WIDTH, tiny(FAMILY).context_dim),
    "modulation.1": (4 * WIDTH, WIDTH),
}
HALVES = {
    "transformer_blocks.0.img_mlp.gate_layer": (3 * WIDTH, WIDTH),
    "transformer_blocks.1.img_mlp.proj": (3 * WIDTH, WIDTH),
}


@pytest.mark.parametrize(
    ("name", "up", "down", "layers"),
    [
        ("transformer.{}", "lora_B", "lora_A", LAYERS | HALVES),
        ("{}", "lora_B", "lora_A", LAYERS | HALVES),
        (
            "diffusion_model.{}",
            "lora_B",
            "lora_A",
            LAYERS | {"transformer_blocks.0.img_mlp.gate_up": (6 * WIDTH, WIDTH)},
        ),
        ("lora_unet_{}", "lora_up", "lora_down", LAYERS),
        ("lycoris_{}", "lora_up", "lora_down", LAYERS | HALVES),
    ],
    ids=["diffusers", "plain", "ai-toolkit", "kohya", "lycoris"],
)
def test_lora(
    comfy_server: ComfyServer,
    same_as_stock: Compare,
    name: str,
    up: str,
    down: str,
    layers: dict[str, tuple[int, int]],
) -> None:
    """Under the names that each trainer gives its tensors, gate and up of the MLP apart."""
    file = f"qwen21_{len(name)}{up}.safetensors"
    generator = torch.Generator().manual_seed(len(layers))
    tensors = {}
    for path, (rows, columns) in layers.items():
        own = name.format(path.replace(".", "_") if name.startswith(("lora", "lyco")) else path)
        tensors[f"{own}.{up}.weight"] = torch.randn(rows, 4, generator=generator)
        factor = 0.1 * torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"{own}.{down}.weight"] = factor
    (comfy_server.models / "loras").mkdir(exist_ok=True)
    save_file(tensors, comfy_server.models / "loras" / file)
    plain, patched = image_edit(1), image_edit(1)
    patched["lora"] = node(
        "LoraLoaderModelOnly", model=["model", 0], lora_name=file, strength_model=0.9
    )
    patched["cache"]["inputs"]["model"] = ["lora", 0]
    without = comfy_server.latent(comfy_server.run(plain))
    changed = comfy_server.latent(same_as_stock(patched))
    assert (changed - without).abs().max() > 1e-2 * without.std()


def refused(server: ComfyServer, prompt: Prompt) -> str:
    with pytest.raises(PromptError) as error:
        server.run(prompt)
    print(f"{error.value.type}: {error.value.message}")
    return error.value.message


def test_the_text_encoder_of_another_model(comfy_server: ComfyServer) -> None:
    caption = node("TPTestConditioning", seed=1, length=20, width=63, batch=1)
    prompt = text_to_image() | {"text": caption}
    prompt["sampler"]["inputs"]["negative"] = ["text", 0]
    message = refused(comfy_server, prompt)
    assert "Captions of Qwen-Image-2.1 have the shape (batch, tokens, width 64)" in message
    assert "Use the text encoder that belongs to the model." in message


def test_latents_of_another_model(comfy_server: ComfyServer) -> None:
    comfy_server.put_latent("flux1.latent", torch.ones(1, 16, 16, 16))
    latent = node("LoadLatent", latent="flux1.latent")
    message = refused(comfy_server, text_to_image() | {"latent": latent})
    assert "(batch, 64, height, width); got (1, 16, 16, 16)" in message


def test_a_vae_of_another_model(comfy_server: ComfyServer) -> None:
    prompt = image_edit(1) | {"vae": node("TPTestVAE", channels=16, video=False)}
    message = refused(comfy_server, prompt)
    assert "Reference latents" in message or "64" in message
