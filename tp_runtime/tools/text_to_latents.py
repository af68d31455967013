"""``python -m tp_runtime text-to-latents``: samples without ComfyUI and compares sizes."""

import argparse
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..client.runtime import Runtime
from ..config import GroupConfig, Layout, ModelSpec
from ..errors import InputError
from .cli import check_counts, check_size

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, and how to sample."""
    parser.description = (
        "Sample latents from a file of conditioning tensors: 'context', and what else the model "
        "takes ('y', 'guidance'), by ComfyUI's names."
    )
    parser.add_argument("file", help="a model file of ComfyUI's diffusion_models folder")
    parser.add_argument("conditioning", help="safetensors file with the conditioning")
    parser.add_argument("output", help="safetensors file to write, with the tensor 'samples'")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="TP size (default 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("W", "H"))
    parser.add_argument("--frames", type=int, default=1, help="of a video (default 1)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shift", type=float, default=3.0, help="of the sigmas (default 3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--compare", action="store_true", help="sample at TP 1, too, and print the difference"
    )


def run(options: argparse.Namespace) -> None:
    """Sample, and write the latents. What cannot work is refused before anything is loaded."""
    check_counts({"steps": options.steps, "frames": options.frames})
    _check_output(Path(options.output))
    conditioning = _read_conditioning(options.conditioning, getattr(torch, options.dtype))
    latents = _sample(options, conditioning, options.tp)
    save_file({"samples": latents}, options.output)
    print(f"wrote {options.output}: {tuple(latents.shape)}")
    if options.compare:
        alone = _sample(options, conditioning, 1)
        difference = (latents - alone).abs().max() / alone.std()
        print(f"max difference to tp_size=1: {difference:.2e} (relative to the latent's std)")


def _sample(
    options: argparse.Namespace, conditioning: dict[str, torch.Tensor], tp_size: int
) -> torch.Tensor:
    """Latents (B, C, H/8, W/8) fp32 after Euler steps along shifted, evenly spaced sigmas."""
    spec = ModelSpec.of(options.file, options.dtype, options.dtype)
    runtime = Runtime()
    try:
        started = time.perf_counter()
        model = runtime.model(spec, GroupConfig.of_layout(Layout(tp_size)))
        geometry, (width, height) = model.info.sizes.geometry, options.size
        check_size(width, height, geometry.downscale)
        model.ensure_loaded()
        load_ms = 1000 * (time.perf_counter() - started)
        shape = geometry.latent_shape(width, height, options.frames)
        context = conditioning["context"]
        batch = context.shape[0]
        generator = torch.Generator().manual_seed(options.seed)
        x = torch.randn(batch, *shape, generator=generator)
        even = torch.linspace(1, 0, options.steps + 1)
        sigmas = options.shift * even / (1 + (options.shift - 1) * even)
        started = time.perf_counter()
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            timesteps = torch.full((batch,), sigma)
            inputs = {"x": x.to(context.dtype), "timesteps": timesteps, **conditioning}
            velocity = model.evaluate(inputs)
            assert isinstance(velocity, torch.Tensor)  # as x is
            x = x + (following - sigma) * velocity.float()
        e2e_time_ms = 1000 * (time.perf_counter() - started)
        print(
            f"tp_size={tp_size} e2e_time_ms={e2e_time_ms:.0f} ms_per_step="
            f"{e2e_time_ms / options.steps:.1f} load_ms={load_ms:.0f}"
        )
        for rank in runtime.reports()[0].ranks:
            held = rank["models"][model.name]["resident_bytes"] / GIB
            peak = rank["memory"].get("peak_bytes", 0) / GIB
            print(
                f"  rank {rank['rank']}: tp_world_size={rank['tp_world_size']} on "
                f"{rank['device']}, weights {held:.3f} GiB"
                + (f", peak {peak:.2f} GiB" if peak else "")
            )
        return x
    finally:
        runtime.release()


def _check_output(path: Path) -> None:
    """A file can be written there. Raises InputError."""
    folder = path.parent
    if path.is_dir():
        raise InputError(f"The output {path} is a folder: give a file to write.")
    if not folder.is_dir():
        raise InputError(
            f"The output {path} cannot be written: there is no folder {folder}. Make it, or give a "
            "file in another one."
        )
    if not all(os.access(one, os.W_OK) for one in (folder, path) if one.exists()):
        raise InputError(f"The output {path} may not be written by this user: give another file.")


def _read_conditioning(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of the file, in the dtype of the model. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"The conditioning file {path} does not exist.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"The conditioning file {path} is no safetensors file that can be read ({error}). "
            "Write it with safetensors.torch.save_file, with the tensor 'context'."
        ) from error
    if "context" not in tensors:
        raise InputError(
            f"The conditioning file {path} has the tensors {sorted(tensors)}; 'context', of shape "
            "(batch, tokens, width), must be among them."
        )
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
