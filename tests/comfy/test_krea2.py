"""The official graph of Krea 2 over HTTP, with only the loader swapped, and what it refuses.

Source: ComfyUI's template `image_krea2_turbo_t2i` (Comfy-Org/workflow_templates 2a0b959), node by
node; its files are tiny here, under the same names.
"""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.newer import is_known
from support.random_numbers import normal
from support.template_models import write_krea2_template_models
from support.tiny_models import tiny, write_tiny
from support.workflows import Prompt, node, tp_loader

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not is_known("krea2"), reason="this ComfyUI has no Krea 2"),
]

MODEL, LORA = "krea2_turbo_fp8_scaled.safetensors", "krea2_darkbrush.safetensors"
PLAIN = "krea2_turbo_bf16.safetensors"
BATCH_TOLERANCE = 1e-4
SIZES = tiny("krea2")

Compare = Callable[..., History]


@pytest.fixture(scope="module", autouse=True)
def files(comfy_server: ComfyServer) -> None:
    write_krea2_template_models(comfy_server.models)
    write_tiny("krea2", comfy_server.models / "diffusion_models" / PLAIN)
    pixels = (normal((48, 80, 3), torch.Generator().manual_seed(0)) * 40 + 128).clamp(0, 255)
    picture = Image.fromarray(pixels.to(torch.uint8).numpy())
    picture.save(comfy_server.base / "input" / "krea2.png")


def graph(*, file: str = MODEL, lora: bool = False, batch_size: int = 1) -> Prompt:
    """The template's, with its switch for the LoRA, and without what writes a longer prompt."""
    encoder = "qwen3vl_4b_fp8_scaled.safetensors"
    return {
        "model": tp_loader(file, 2),
        "clip": node("CLIPLoader", clip_name=encoder, type="krea2", device="default"),
        "vae": node("VAELoader", vae_name="qwen_image_vae.safetensors"),
        "lora": node("LoraLoaderModelOnly", model=["model", 0], lora_name=LORA, strength_model=0.8),
        "switched": node(
            "ComfySwitchNode", on_false=["model", 0], on_true=["lora", 0], switch=lora
        ),
        "user": node("PrimitiveStringMultiline", value="a human hand holding a martini glass"),
        "system": node("PrimitiveStringMultiline", value="You are an expert prompt engineer."),
        "asked": node(
            "StringConcatenate", string_a=["system", 0], string_b=["user", 0], delimiter=""
        ),
        "shown": node("PreviewAny", source=["user", 0]),
        "triggered": node(
            "StringConcatenate",
            string_a=["shown", 0],
            string_b="muted minimalist sketch style",
            delimiter=", ",
        ),
        "caption": node(
            "ComfySwitchNode", on_false=["shown", 0], on_true=["triggered", 0], switch=lora
        ),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=["caption", 0]),
        "nothing": node("ConditioningZeroOut", conditioning=["text", 0]),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=batch_size),
        "sampler": node(
            "KSampler",
            model=["switched", 0],
            positive=["text", 0],
            negative=["nothing", 0],
            latent_image=["latent", 0],
            seed=735915477938686,
            steps=8,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "picture": node("SaveImage", images=["decoded", 0], filename_prefix="Krea2_turbo"),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test"),
    }


def with_reference(method: str, batch_size: int = 1) -> Prompt:
    """A picture that the model looks at, by the method of that node."""
    prompt = graph(batch_size=batch_size) | {
        "loaded": node("LoadImage", image="krea2.png"),
        "encoded": node("VAEEncode", pixels=["loaded", 0], vae=["vae", 0]),
        "referring": node("ReferenceLatent", conditioning=["text", 0], latent=["encoded", 0]),
        "method": node(
            "FluxKontextMultiReferenceLatentMethod",
            conditioning=["referring", 0],
            reference_latents_method=method,
        ),
    }
    prompt["sampler"]["inputs"]["positive"] = ["method", 0]
    return prompt


@pytest.mark.parametrize(("file", "lora"), [(MODEL, False), (MODEL, True), (PLAIN, True)])
def test_the_official_graph(same_as_stock: Compare, file: str, lora: bool) -> None:
    same_as_stock(graph(file=file, lora=lora))


def test_a_batch(same_as_stock: Compare) -> None:
    same_as_stock(graph(batch_size=2), BATCH_TOLERANCE)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("method", ["index", "index_timestep_zero"])
def test_references(comfy_server: ComfyServer, same_as_stock: Compare, method: str) -> None:
    """For each latent of a batch the same; without a method, the model does not look at them."""
    prompt = with_reference(method)
    found = comfy_server.latent(same_as_stock(prompt))
    same_as_stock(with_reference(method, batch_size=2), BATCH_TOLERANCE)
    prompt["sampler"]["inputs"]["positive"] = ["referring", 0]
    unread = comfy_server.latent(same_as_stock(prompt))
    plain = comfy_server.latent(comfy_server.run(graph()))
    assert torch.equal(unread, plain)
    assert (found - plain).abs().max() > 1e-2 * plain.std()


# --- LoRAs, under the names that each trainer gives their tensors ---------------------------------

WIDTH, KV = SIZES.dim, SIZES.num_kv_heads * SIZES.head_dim
IN_THE_FILE = {
    "blocks.0.attn.wq": (WIDTH, WIDTH),
    "blocks.1.attn.wk": (KV, WIDTH),
    "blocks.0.attn.gate": (WIDTH, WIDTH),
    "blocks.1.mlp.down": (WIDTH, SIZES.ffn_dim),
    "txtfusion.refiner_blocks.0.attn.wo": (SIZES.text_dim, SIZES.text_dim),
    "tproj.1": (6 * WIDTH, WIDTH),
}
IN_DIFFUSERS = {
    "transformer_blocks.0.attn.to_v": (KV, WIDTH),
    "transformer_blocks.1.attn.to_gate": (WIDTH, WIDTH),
    "transformer_blocks.0.attn.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.1.ff.up": (SIZES.ffn_dim, WIDTH),
    "text_fusion.layerwise_blocks.1.ff.gate": (SIZES.text_ffn_dim, SIZES.text_dim),
    "txt_in.linear_2": (WIDTH, WIDTH),
    "final_layer.linear": (64, WIDTH),
}
_UP_AND_DOWN, _B_AND_A = ("lora_up", "lora_down"), ("lora_B", "lora_A")
# Trainer → how it calls a layer, and the two factors; and the names that it starts from.
STYLES: dict[str, tuple[Callable[[str], str], tuple[str, str], dict[str, tuple[int, int]]]] = {
    "kohya": (lambda path: f"lora_unet_{path.replace('.', '_')}", _UP_AND_DOWN, IN_THE_FILE),
    "ai-toolkit": (lambda path: f"diffusion_model.{path}", _B_AND_A, IN_THE_FILE),
    "ai-toolkit, diffusers": (lambda path: f"diffusion_model.{path}", _B_AND_A, IN_DIFFUSERS),
    "diffusers": (lambda path: f"transformer.{path}", _B_AND_A, IN_DIFFUSERS),
    "diffusers, bare": (lambda path: path, _B_AND_A, IN_DIFFUSERS),
    "SimpleTuner": (lambda path: f"lycoris_{path.replace('.', '_')}", _UP_AND_DOWN, IN_DIFFUSERS),
}


@pytest.mark.rotates(5)
@pytest.mark.parametrize("style", STYLES)
def test_lora(comfy_server: ComfyServer, same_as_stock: Compare, style: str) -> None:
    named, (up, down), layers = STYLES[style]
    generator = torch.Generator().manual_seed(len(style))
    tensors = {}
    for path, (rows, columns) in layers.items():
        tensors[f"{named(path)}.{up}.weight"] = normal((rows, 4), generator)
        factor = 0.3 * normal((4, columns), generator) / columns**0.5
        tensors[f"{named(path)}.{down}.weight"] = factor
    (comfy_server.models / "loras").mkdir(exist_ok=True)
    save_file(tensors, comfy_server.models / "loras" / "krea2_style.safetensors")
    prompt = graph(file=PLAIN, lora=True)
    prompt["lora"]["inputs"] |= {"lora_name": "krea2_style.safetensors", "strength_model": 0.9}
    without = comfy_server.latent(comfy_server.run(graph(file=PLAIN, lora=True)))
    changed = comfy_server.latent(same_as_stock(prompt))
    assert (changed - without).abs().max() > 1e-2 * without.std()


# --- what is refused ------------------------------------------------------------------------


def refused(server: ComfyServer, prompt: Prompt) -> str:
    with pytest.raises(PromptError) as error:
        server.run(prompt)
    print(f"{error.value.type}: {error.value.message}")
    assert error.value.node_id == "sampler"
    assert error.value.type.endswith("InputError")
    return error.value.message


def test_the_text_encoder_of_another_model(comfy_server: ComfyServer) -> None:
    caption = node("TPTestConditioning", seed=1, length=20, width=SIZES.text_dim, batch=1)
    message = refused(comfy_server, graph() | {"text": caption})
    assert "Captions of Krea 2 have the shape (batch, tokens, width 960)" in message
    assert "Use the text encoder that belongs to the model." in message


def test_a_reference_of_several_frames(comfy_server: ComfyServer) -> None:
    comfy_server.put_latent("video.latent", torch.ones(1, 16, 3, 8, 8))
    prompt = with_reference("index") | {"encoded": node("LoadLatent", latent="video.latent")}
    message = refused(comfy_server, prompt)
    assert "Reference latents of Krea 2 have the shape (batch, 16, 1, rows, columns)" in message
