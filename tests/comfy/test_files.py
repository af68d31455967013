"""Every file format gives, in a real ComfyUI, what the stock nodes make of the same weights."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.comfy_history import History
from support.comfy_server import ComfyServer
from support.diffusers_folders import write_folder
from support.gguf_files import ARCHITECTURES, dequantised, write_gguf
from support.lora_files import write_lora
from support.quantised_files import write_quantised
from support.tiny_models import Fp8Layout, tiny_shapes, write_fp8
from support.workflows import node, stock_loader, stock_twin, text_to_latent, tp_text_to_latent

pytestmark = pytest.mark.comfy

TOLERANCE = 1e-5
MOST_OF_QUANTISING = 0.3  # of the norm of a latent after a few steps

Compare = Callable[..., History]


@pytest.fixture(scope="module")
def files(comfy_server: ComfyServer) -> Path:
    """ComfyUI's folder of diffusion models."""
    return comfy_server.models / "diffusion_models"


def offered(server: ComfyServer) -> list[str]:
    """The loader's list of models, as ComfyUI's page gets it."""
    info = server.get("/object_info/TPLoadDiffusionModel")["TPLoadDiffusionModel"]
    kind, options = info["input"]["required"]["unet_name"]
    return list(options["options"] if kind == "COMBO" else kind)


@pytest.mark.parametrize("file_input", ["unet_name", "model_name"])
def test_a_prompt_that_was_edited_by_hand(
    tiny_z_image: Path, same_as_stock: Compare, file_input: str
) -> None:
    """The stock loader's with just the type changed; and with the input's name of before."""
    stock = text_to_latent(stock_loader(tiny_z_image.name))
    edited = copy.deepcopy(stock)
    edited["model"]["class_type"] = "TPLoadDiffusionModel"
    inputs = edited["model"]["inputs"]
    inputs[file_input] = inputs.pop("unet_name")
    same_as_stock(edited, stock=stock)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("layout", ["scaled", "mixed"])
def test_fp8_with_scales(
    files: Path, tiny_z_image: Path, same_as_stock: Compare, layout: Fp8Layout
) -> None:
    path = write_fp8(tiny_z_image, files / f"{layout}.safetensors", layout)
    same_as_stock(tp_text_to_latent(path.name))


def test_plain_fp8(files: Path, tiny_z_image: Path, same_as_stock: Compare) -> None:
    path = write_fp8(tiny_z_image, files / "plain.safetensors", "plain")
    same_as_stock(tp_text_to_latent(path.name))


@pytest.mark.rotates(5)
@pytest.mark.parametrize("choice", ["fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_the_stock_loaders_choices(tiny_z_image: Path, same_as_stock: Compare, choice: str) -> None:
    prompt = tp_text_to_latent(tiny_z_image.name)
    prompt["model"]["inputs"]["weight_dtype"] = choice
    stock = stock_twin(prompt)
    stock["model"]["inputs"]["weight_dtype"] = choice
    same_as_stock(prompt, stock=stock)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("name", ["int8_convrot", "nvfp4"])
def test_quantised_as_the_templates_load_it(
    comfy_server: ComfyServer, files: Path, tiny_z_image: Path, name: str
) -> None:
    """0.3.75 cannot load these: near what the stock nodes make before quantising, with a LoRA, too.

    That the numbers are those of a ComfyUI which can, `tests/parity/test_quantised.py` shows.
    """
    path = write_quantised(tiny_z_image, files / f"z_image_turbo_{name}.safetensors", name)
    layers = ("layers.0.attention.qkv", "layers.1.feed_forward.w2")
    shapes = tiny_shapes("z_image")
    lora = write_lora(
        comfy_server.models / "loras" / "quantised.safetensors",
        [(layer, shapes[f"{layer}.weight"]) for layer in layers],
    )
    for loras in ((), (lora.name,)):
        prompt = tp_text_to_latent(path.name)
        for one in loras:
            prompt["lora"] = node(
                "LoraLoaderModelOnly", model=["model", 0], lora_name=one, strength_model=0.8
            )
            prompt["sampler"]["inputs"]["model"] = ["lora", 0]
        found = comfy_server.latent(comfy_server.run(prompt))
        twin = stock_twin(prompt) | {"model": stock_loader(tiny_z_image.name)}
        expected = comfy_server.latent(comfy_server.run(twin))
        error = ((found - expected).norm() / expected.norm()).item()
        print(f"{name} {loras}: {error:.4f}")
        assert 0 < error < MOST_OF_QUANTISING


def test_a_full_checkpoint(files: Path, tiny_z_image: Path, same_as_stock: Compare) -> None:
    tensors = {f"model.diffusion_model.{k}": v for k, v in load_file(tiny_z_image).items()}
    tensors["vae.decoder.conv_in.weight"] = tensors["model.diffusion_model.x_pad_token"].clone()
    save_file(tensors, files / "full.safetensors")
    same_as_stock(tp_text_to_latent("full.safetensors"))


@pytest.mark.rotates(3)
@pytest.mark.parametrize(("name", "num_shards"), [("whole", 1), ("below/sharded", 2)])
def test_a_diffusers_folder(
    comfy_server: ComfyServer, files: Path, tiny_z_image: Path, name: str, num_shards: int
) -> None:
    (files / name).parent.mkdir(exist_ok=True)
    write_folder(tiny_z_image, files / name, "z_image", num_shards)
    assert [entry for entry in offered(comfy_server) if entry.startswith(name)] == [name]
    assert_equal_to_stock_on(comfy_server, name, tiny_z_image.name)


@pytest.mark.rotates(3)
@pytest.mark.parametrize("folder", ["diffusion_models", "unet"])
def test_gguf(comfy_server: ComfyServer, files: Path, tiny_z_image: Path, folder: str) -> None:
    path = comfy_server.models / folder / "below" / f"{folder}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(tiny_z_image, path, "Q4_K", architecture=ARCHITECTURES["z_image"])
    values = dequantised(path, tiny_z_image, files / f"{folder}_values.safetensors")
    name = f"below/{path.name}"
    assert name in offered(comfy_server)
    assert_equal_to_stock_on(comfy_server, name, values.name)


def assert_equal_to_stock_on(server: ComfyServer, name: str, stock_name: str) -> None:
    """What the stock nodes cannot load is compared with them on a file of the same weights."""
    prompt = tp_text_to_latent(name)
    found = server.latent(server.run(prompt))
    twin = stock_twin(prompt) | {"model": stock_loader(stock_name)}
    expected = server.latent(server.run(twin))
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= TOLERANCE * expected.std()
