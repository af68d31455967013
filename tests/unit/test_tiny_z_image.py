"""The tiny Z-Image checkpoint is a useful stand-in: real keys, and an output that reacts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from support.native import native_model
from support.tiny_models import tiny_shapes, write_tiny
from tp_runtime.models import families

Denoise = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def denoise(tmp_path_factory: pytest.TempPathFactory) -> Denoise:
    model = native_model(
        write_tiny("z_image", tmp_path_factory.mktemp("tiny") / "z_image.safetensors")
    )

    def call(latent: torch.Tensor, timestep: float, caption: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(latent),), timestep)
        with torch.inference_mode():
            return model(latent, timesteps, caption, num_tokens=caption.shape[1])

    return call


def random_tensor(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_output_is_of_the_latents_size(denoise: Denoise) -> None:
    latent, caption = random_tensor(1, 16, 16, 24, seed=1), random_tensor(1, 20, 64, seed=2)
    output = denoise(latent, 0.7, caption)
    assert output.shape == latent.shape
    assert 0.3 < output.std() < 3


def test_output_depends_on_latent_timestep_and_caption(denoise: Denoise) -> None:
    latent, caption = random_tensor(1, 16, 16, 16, seed=1), random_tensor(1, 20, 64, seed=2)
    output = denoise(latent, 0.7, caption)
    changed = {
        "latent": denoise(random_tensor(1, 16, 16, 16, seed=3), 0.7, caption),
        "timestep": denoise(latent, 0.6, caption),
        "caption": denoise(latent, 0.7, random_tensor(1, 20, 64, seed=4)),
        "caption length": denoise(latent, 0.7, caption[:, :19]),
    }
    relative = {
        name: float((other - output).std() / output.std()) for name, other in changed.items()
    }
    assert all(change > 0.02 for change in relative.values()), relative


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_prefix_renames_the_same_tensors(tmp_path: Path, prefix: str) -> None:
    path = write_tiny("z_image", tmp_path / "z.safetensors", prefix=prefix, dtype=torch.bfloat16)
    with safe_open(path, framework="pt") as file:
        keys = file.keys()
    assert {key.removeprefix(prefix) for key in keys} == set(tiny_shapes("z_image"))
    native_model(path, torch.bfloat16)


def test_real_size_has_the_real_proportions() -> None:
    real = families()["z_image"].published
    assert (real.dim, real.ffn_dim, real.axes_dims) == (3840, 10240, (32, 48, 48))
    shapes = real.table.file_tensors.values()
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    assert round(parameters / 1e9, 2) == 6.15
