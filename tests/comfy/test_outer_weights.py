"""Weights outside of a model's blocks are given to code of ComfyUI's process: true and patched."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from support.comfy_history import History
from support.comfy_server import ComfyServer
from support.lora_files import write_lora
from support.native import native_patcher
from support.paths import comfyui_path
from support.tiny_controlnets import write_qwen_image_fun_controlnet
from support.tiny_models import tiny_shapes, write_fp8, write_tiny
from support.tiny_vae import WAN_VAE_NAME, write_tiny_wan_vae
from support.workflows import Sampling, node, text_to_latent, tp_loader
from tp_runtime.client import CheckpointError, GroupConfig

pytestmark = pytest.mark.comfy

HAS_FUN = "QwenFunControlNet" in (comfyui_path() / "comfy" / "controlnet.py").read_text()
FILE = "outer_qwen_image.safetensors"
PICTURE = "outer.png"

LAYERS = ("img_in", "time_text_embed.timestep_embedder.linear_1")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen_image", tmp_path_factory.mktemp("outer") / "tiny.safetensors")


@pytest.fixture
def patcher(unstarted: Callable[..., Any], path: Path) -> Any:
    """A MODEL on two ranks that need not be started."""
    return unstarted(path, GroupConfig(2, "cpu"))


def test_of_an_fp8_file(models: ModuleType, path: Path, tmp_path: Path) -> None:
    """In the dtype in which ComfyUI's model has them here, not in the file's."""
    fp8 = write_fp8(path, tmp_path / "fp8.safetensors", "plain")
    found = models.load_model(str(fp8), None, GroupConfig(2, "cpu"), models.Placement(), "auto")
    native = native_patcher(fp8).model.diffusion_model
    x = torch.randn(1, 5, 64)
    assert torch.equal(found.model.diffusion_model.img_in(x), native.img_in(x))


def with_lora(patcher: Any, folder: Path) -> Any:
    """As LoraLoaderModelOnly makes it."""
    import comfy.sd
    import comfy.utils

    shapes = tiny_shapes("qwen_image")
    layers = [(name, shapes[f"{name}.weight"]) for name in LAYERS]
    file = write_lora(folder / "lora.safetensors", layers)
    lora = comfy.utils.load_torch_file(str(file), safe_load=True)
    return comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)[0]


def embedded(model: Any) -> list[torch.Tensor]:
    """What a ControlNet asks of a model."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 6, 64, generator=generator)
    text = torch.randn(2, 9, model.txt_norm.weight.shape[0], generator=generator)
    with torch.inference_mode():
        return [
            model.img_in(image),
            model.txt_in(model.txt_norm(text)),
            model.time_text_embed(torch.tensor([0.3, 0.9]), image),
        ]


def test_embedders_compute_as_stock(patcher: Any, path: Path) -> None:
    stock = native_patcher(path).model.diffusion_model
    pairs = zip(embedded(patcher.model.diffusion_model), embedded(stock), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)


def test_they_are_patched_as_the_model_is(patcher: Any, path: Path, tmp_path: Path) -> None:
    plain = embedded(patcher.model.diffusion_model)
    stock = with_lora(native_patcher(path), tmp_path)
    stock.patch_model()
    expected = embedded(stock.model.diffusion_model)
    changed = with_lora(patcher, tmp_path)
    changed.sync_patches()
    found = embedded(changed.model.diffusion_model)
    for one, of_stock in zip(found, expected, strict=True):
        torch.testing.assert_close(one, of_stock, rtol=1e-5, atol=1e-5)
    assert not found[0].equal(plain[0])
    assert not found[2].equal(plain[2])
    patcher.sync_patches()
    assert embedded(patcher.model.diffusion_model)[0].equal(plain[0])


def test_what_is_done_to_a_value_changes_nothing(patcher: Any, path: Path) -> None:
    weight = patcher.model.diffusion_model.img_in.weight
    weight.data.add_(1)
    weight.to(torch.float32).zero_()
    assert weight.cpu().equal(load_file(path)["img_in.weight"])


def test_they_are_freed_with_the_model(patcher: Any) -> None:
    embedded(patcher.model.diffusion_model)
    assert patcher.model.tp_outer_weights._values
    patcher.detach()
    assert not patcher.model.tp_outer_weights._values


def test_a_file_that_was_replaced(models: ModuleType, tmp_path: Path) -> None:
    path = write_tiny("qwen_image", tmp_path / "tiny.safetensors")
    patcher = models.load_model(
        str(path), torch.float32, GroupConfig(2, "cpu"), models.Placement(), "auto"
    )
    write_tiny("qwen_image", path, seed=1)
    with pytest.raises(CheckpointError, match="was replaced"):
        embedded(patcher.model.diffusion_model)


# Only newer releases of ComfyUI have this ControlNet.


@pytest.mark.skipif(not HAS_FUN, reason="this ComfyUI has no such ControlNet")
@pytest.mark.parametrize(("steps", "lora"), [(1, 0.0), (3, 0.8)])
def test_fun_controlnet_of_qwen_image(
    comfy_server: ComfyServer,
    same_as_stock: Callable[..., History],
    steps: int,
    lora: float,
) -> None:
    """It calls the model's embedders of image, text and time; a LoRA changes those, too."""
    models = comfy_server.models
    write_tiny("qwen_image", models / "diffusion_models" / FILE)
    write_qwen_image_fun_controlnet(models / "controlnet" / FILE)
    write_tiny_wan_vae(models)
    shapes = tiny_shapes("qwen_image")
    layers = [(name, shapes[f"{name}.weight"]) for name in (*LAYERS, "txt_in")]
    write_lora(models / "loras" / FILE, layers)
    Image.new("RGB", (64, 64), (200, 40, 90)).save(comfy_server.base / "input" / PICTURE)
    sampling = Sampling(steps=steps, width=64, height=64, cfg=2.5)
    prompt = text_to_latent(tp_loader(FILE, 2), sampling=sampling)
    plain = comfy_server.latent(comfy_server.run(prompt))
    prompt |= {
        "picture": node("LoadImage", image=PICTURE),
        "vae": node("VAELoader", vae_name=WAN_VAE_NAME),
        "control": node("ControlNetLoader", control_net_name=FILE),
        "lora": node(
            "LoraLoaderModelOnly", model=["model", 0], lora_name=FILE, strength_model=lora
        ),
        "apply": node(
            "ControlNetApplyAdvanced",
            positive=["positive", 0],
            negative=["negative", 0],
            control_net=["control", 0],
            image=["picture", 0],
            vae=["vae", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
        ),
    }
    prompt["sampler"]["inputs"] |= {
        "model": ["lora", 0],
        "positive": ["apply", 0],
        "negative": ["apply", 1],
    }
    found = comfy_server.latent(same_as_stock(prompt))
    assert not found.allclose(plain, atol=0.01)
