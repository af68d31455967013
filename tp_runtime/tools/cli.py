"""The command line: ``python -m tp_runtime COMMAND``.

``plan`` shows what tensor parallelism makes of a model file, before anything runs, and predicts
how long a step takes.
``text-to-latents`` samples without ComfyUI and compares sizes.
``bench`` measures a step on this machine (``bench/step.py``).
``doctor`` checks that this machine can run models, and says what to do where it cannot.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..client.runtime import Runtime
from ..config import GroupConfig, ModelSpec
from ..errors import InputError, TPRuntimeError
from ..layouts.cost_model import DEVICES, LINKS, Prediction, device_of, layouts, predict
from ..models import FAMILIES, family
from ..models.recognise import inspect_checkpoint
from ..sharding.parts import Layer
from .doctor import examine
from .footprint import model_footprint

GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 after a message that says what to do."""
    parser = argparse.ArgumentParser(prog="python -m tp_runtime", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_plan(commands)
    _add_text_to_latents(commands)
    _add_doctor(commands)
    _add_bench(commands)
    options = parser.parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except TPRuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status or 0


# --- plan --------------------------------------------------------------------------------------


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="show each linear of a model file, and its shards; or predict ms per step",
        description="Shows each linear of a model file, and what each rank holds of it. With "
        "--predict: the milliseconds of one step on N GPUs, for each way to use them "
        "(docs/scaling.md).",
    )
    parser.add_argument("file", nargs="?", help="a file of ComfyUI's diffusion_models folder")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="TP size (default 2)")
    parser.add_argument("--predict", action="store_true", help="predict ms per step on N GPUs")
    case = parser.add_argument_group("what to predict")
    case.add_argument("--model", choices=sorted(FAMILIES), help="a published model, without a file")
    case.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("W", "H"))
    case.add_argument("--batch", type=int, default=1, help="of the forward: 2 with CFG (default 1)")
    case.add_argument("--text", type=int, default=512, metavar="L", help="tokens (default 512)")
    case.add_argument(
        "--device", choices=sorted(DEVICES), help="(default: this machine's, or H200)"
    )
    case.add_argument("--link", choices=list(LINKS), default="nvlink", help="(default nvlink)")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    if options.predict:
        _predict(options)
        return
    if options.file is None:
        raise InputError("'plan' needs a model file; with --predict, --model NAME will do.")
    info = inspect_checkpoint(options.file)
    sizes = ", ".join(map(str, info.valid_tp_sizes()))
    print(f"{info.label}, {info.num_parameters / 1e9:.3f} B parameters; TP sizes: {sizes}")
    info.check_tp_size(options.tp)
    layers, shares = model_footprint(info, options.tp)
    print(f"{'layer':58} {'style':12} {'full (in, out)':>16} {'local':>16}")
    for layer in layers:
        style, local = type(layer.match.style).__name__, layer.local(options.tp)
        print(f"{_layer_name(layer):58} {style:12} {layer.full!s:>16} {local!s:>16}")
    print(f"{len(layers)} layers stand for {sum(len(x.replaced) for x in layers)} linears.")
    even = info.num_parameters / options.tp
    for rank, share in enumerate(shares):
        print(
            f"rank {rank}: holds {share.held / 1e9:.3f} B parameters ({share.held / even:.3f} of "
            f"1/{options.tp}), reads {share.read / 1e9:.3f} B"
        )


def _predict(options: argparse.Namespace) -> None:
    if (options.file is None) == (options.model is None):
        raise InputError("'plan --predict' needs either a model file or --model NAME.")
    if options.tp < 1 or options.batch < 1:
        raise InputError(f"{options.tp} GPUs and batch {options.batch}: both must be 1 or more.")
    if options.file is not None:
        info = inspect_checkpoint(options.file)
        name, config = info.family, info.config
    else:
        from bench.dummy import config_of  # beside this package, as for the command bench

        name, config = options.model, config_of(options.model)
    if options.device is not None:
        device = DEVICES[options.device]
    elif torch.cuda.is_available():
        device = device_of(torch.cuda.get_device_name())
    else:
        device = DEVICES["H200"]
    link = LINKS[options.link]
    width, height = options.size
    shape = options.batch, *family(name).latent_shape(config, width, height)
    print(
        f"{family(name).LABEL}, {width} x {height}, batch {options.batch}, {options.text} text "
        f"tokens, bf16. Predicted ms per step on {options.tp} GPUs:"
    )
    print(f"  GPU {device.name}: {device.source}")
    print(f"  link {link.name}: {link.source}")
    parts = [part.name for part in dataclasses.fields(Prediction)]
    print(" ".join(f"{title:>11}" for title in ("TP x groups", "ms", *parts)))
    for layout in layouts(name, config, options.tp):
        sizes = layout.tp_size, layout.batch_groups
        found = predict(name, config, shape, options.text, *sizes, device, link)
        times = (found.ms, *(getattr(found, part) for part in parts))
        print(f"{layout!s:>11}", *(f"{ms:11.1f}" for ms in times))


def _layer_name(layer: Layer) -> str:
    if layer.replaced == (layer.path,):
        return layer.path
    return f"{layer.path} <- {', '.join(layer.match.names)}"


# --- text-to-latents ---------------------------------------------------------------------------


def _add_text_to_latents(commands: Any) -> None:
    parser = commands.add_parser(
        "text-to-latents",
        help="sample latents without ComfyUI (Euler, flow matching, no guidance)",
        description="Sample latents from a file of conditioning tensors: 'context', and what else "
        "the model takes ('y', 'guidance'), by ComfyUI's names.",
    )
    parser.add_argument("file", help="a model file of ComfyUI's diffusion_models folder")
    parser.add_argument("conditioning", help="safetensors file with the conditioning")
    parser.add_argument("output", help="safetensors file to write, with the tensor 'samples'")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="TP size (default 2)")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("W", "H"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shift", type=float, default=3.0, help="of the sigmas (default 3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument(
        "--compare", action="store_true", help="sample at TP 1, too, and print the difference"
    )
    parser.set_defaults(run=_text_to_latents)


def _text_to_latents(options: argparse.Namespace) -> None:
    latents = _sample(options, options.tp)
    save_file({"samples": latents}, options.output)
    print(f"wrote {options.output}: {tuple(latents.shape)}")
    if options.compare:
        alone = _sample(options, 1)
        difference = (latents - alone).abs().max() / alone.std()
        print(f"max difference to tp_size=1: {difference:.2e} (relative to the latent's std)")


def _sample(options: argparse.Namespace, tp_size: int) -> torch.Tensor:
    """Latents (B, C, H/8, W/8) fp32 after Euler steps along shifted, evenly spaced sigmas."""
    dtype: torch.dtype = getattr(torch, options.dtype)
    conditioning = _read_conditioning(options.conditioning, dtype)
    spec = ModelSpec.of(options.file, options.dtype, options.dtype)
    runtime = Runtime()
    try:
        started = time.perf_counter()
        model = runtime.model(spec, GroupConfig.local(tp_size))
        model.ensure_loaded()
        load_ms = 1000 * (time.perf_counter() - started)
        shape = family(model.info.family).latent_shape(model.info.config, *options.size)
        batch = conditioning["context"].shape[0]
        generator = torch.Generator().manual_seed(options.seed)
        x = torch.randn(batch, *shape, generator=generator)
        even = torch.linspace(1, 0, options.steps + 1)
        sigmas = options.shift * even / (1 + (options.shift - 1) * even)
        started = time.perf_counter()
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            timesteps = torch.full((batch,), sigma)
            inputs = {"x": x.to(dtype), "timesteps": timesteps, **conditioning}
            velocity = model.evaluate(inputs).float()
            x = x + (following - sigma) * velocity
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


def _read_conditioning(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise InputError(f"The conditioning file {path} does not exist.")
    tensors = load_file(path)
    if "context" not in tensors:
        raise InputError(
            f"The conditioning file {path} has the tensors {sorted(tensors)}; 'context', of shape "
            "(batch, tokens, width), must be among them."
        )
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


# --- doctor ------------------------------------------------------------------------------------


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="check this machine, and say what to do")
    parser.add_argument(
        "--python", help="the Python of the ranks (default: TP_RUNTIME_PYTHON, else this one)"
    )
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    checks = examine(options.python)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = f"{check.status:8} {check.name:{width}}  {check.text}"
        print(f"{line} {check.advice}" if check.advice else line)
    return int(any(check.status == "failed" for check in checks))


# --- bench -------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    from bench import step  # beside this package; imports what this module imports, too

    parser = commands.add_parser("bench", help="measure an evaluation, with random weights")
    step.add_arguments(parser)
    parser.set_defaults(run=step.run)
