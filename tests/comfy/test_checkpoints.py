"""Load Checkpoint (TP): what ComfyUI's Load Checkpoint gives, with the model on the ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.comfy_history import History, PromptError
from support.comfy_server import ComfyServer
from support.full_checkpoints import write_full
from support.group_reports import rank_pids
from support.workflows import Prompt, Sampling, node, text_to_latent, with_report

pytestmark = pytest.mark.comfy

VAE_TOLERANCE = 1e-4
STOCK, OURS = "CheckpointLoaderSimple", "TPLoadCheckpoint"

Compare = Callable[..., History]


@pytest.fixture(scope="module")
def files(comfy_server: ComfyServer) -> Path:
    """ComfyUI's folder of checkpoints."""
    folder = comfy_server.models / "checkpoints"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def whole(files: Path, tiny_z_image: Path) -> str:
    return write_full(tiny_z_image, files / "whole.safetensors", "z_image").name


def with_loader(class_type: str, name: str, **inputs: str) -> Prompt:
    """Text to picture and back to a latent, with all that the checkpoint has."""
    loader = node(class_type, ckpt_name=name, **inputs)
    return text_to_latent(loader, sampling=Sampling(steps=2)) | {
        "positive": node("CLIPTextEncode", clip=["model", 1], text="a red circle"),
        "negative": node("CLIPTextEncode", clip=["model", 1], text=""),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["model", 2]),
        "encoded": node("VAEEncode", pixels=["decoded", 0], vae=["model", 2]),
        "save encoded": node("SaveLatent", samples=["encoded", 0], filename_prefix="latents/vae"),
    }


def test_it_gives_what_load_checkpoint_gives(whole: str, same_as_stock: Compare) -> None:
    prompt = with_report(with_loader(OURS, whole, gpu_count="2", layout="tp"))
    history = same_as_stock(prompt, VAE_TOLERANCE, with_loader(STOCK, whole))
    assert len(rank_pids(history)) == 2


def test_only_the_type_is_changed(comfy_server: ComfyServer, whole: str) -> None:
    """The stock loader's prompt, with our loader's name in it, as a person edits a JSON."""
    prompt = with_loader(STOCK, whole)
    prompt["model"]["class_type"] = OURS
    history = comfy_server.run(with_report(prompt))
    assert len(rank_pids(history, 1)) == 1


def test_a_checkpoint_without_a_text_encoder(
    files: Path, tiny_z_image: Path, same_as_stock: Compare
) -> None:
    """As those of LTX-Video, whose text encoder is another file."""
    path = write_full(tiny_z_image, files / "no_clip.safetensors", "z_image", with_clip=False)

    def prompt(class_type: str) -> Prompt:
        captions = text_to_latent({}, sampling=Sampling(steps=2))
        own = {name: captions[name] for name in ("positive", "negative")}
        return with_loader(class_type, path.name) | own

    same_as_stock(prompt(OURS), VAE_TOLERANCE, prompt(STOCK))


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_diffusion_model_alone(
    comfy_server: ComfyServer, files: Path, tiny_z_image: Path, prefix: str
) -> None:
    """It runs, as in ComfyUI; what it lacks is said where it is used, in ComfyUI's words."""
    path = files / f"alone_{len(prefix)}.safetensors"
    save_file({prefix + name: value for name, value in load_file(tiny_z_image).items()}, path)
    prompt = text_to_latent(node(OURS, ckpt_name=path.name), sampling=Sampling(steps=1))
    comfy_server.run(prompt)
    every = with_loader(OURS, path.name)
    with pytest.raises(PromptError, match="does not contain a valid clip"):
        comfy_server.run(every)
    with pytest.raises(PromptError, match="does not contain a valid VAE"):
        comfy_server.run(every | {name: prompt[name] for name in ("positive", "negative")})


def test_a_checkpoint_that_cannot_be_split(comfy_server: ComfyServer, files: Path) -> None:
    path = files / "other.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({name: torch.ones(4, 4)}, path)
    with pytest.raises(PromptError, match="cannot be split yet"):
        comfy_server.run(text_to_latent(node(OURS, ckpt_name=path.name)))
    counts = f"/tensor_parallel/gpu_counts?ckpt_name={path.name}"
    with pytest.raises(OSError, match="400"):
        comfy_server.post(counts)
