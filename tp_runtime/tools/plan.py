"""``python -m tp_runtime plan``: what tensor parallelism makes of a model, before anything runs."""

import argparse
import dataclasses
import math
from collections import Counter

import torch

from ..config import PRECISIONS, fitting_weights, gpu_memory, quantised_products
from ..errors import InputError, SizeError
from ..layouts.choice import link_between, native_workload_of
from ..layouts.cost_model import (
    DEVICES,
    LINKS,
    Device,
    Prediction,
    layouts,
    predict,
    usual_link,
)
from ..layouts.gpus import Gpu, best_first, devices_of, gpus_of
from ..layouts.link_records import LinkRecords
from ..layouts.room import bytes_beside, streamed_bytes
from ..layouts.step_history import Workload
from ..models import families
from ..models.family import Family, Sizes
from ..recognise import CheckpointInfo, inspect_checkpoint
from ..sharding.parts import Layer
from ..sharding.quantisation import Quantisation
from .cli import check_counts, check_size
from .footprint import PLAIN_BYTES, Footprint, model_footprint

_GIB = 2**30
_EIGHT_BITS = "8 bits; measured for FLUX.1 on two H200s only"

Extent = tuple[int, int, int]  # width and height in pixels, and frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A file, or what to predict."""
    parser.description = (
        "Shows each linear of a model file, and what each rank holds of it. With --predict: the "
        "milliseconds of one step on N GPUs, for each way to use them (docs/scaling.md)."
    )
    parser.add_argument("file", nargs="?", help="a file of ComfyUI's diffusion_models folder")
    parser.add_argument("--tp", type=int, default=2, metavar="N", help="TP size (default 2)")
    parser.add_argument("--predict", action="store_true", help="predict ms per step on N GPUs")
    case = parser.add_argument_group("what to predict")
    case.add_argument(
        "--model", choices=sorted(families()), help="a published model, without a file"
    )
    usual = "(default: what the model usually makes)"
    case.add_argument("--size", type=int, nargs=2, metavar=("W", "H"), help=f"in pixels {usual}")
    case.add_argument("--frames", type=int, help=f"of a video {usual}")
    case.add_argument("--batch", type=int, default=1, help="of the forward: 2 with CFG (default 1)")
    case.add_argument("--text", type=int, default=512, metavar="L", help="tokens (default 512)")
    case.add_argument(
        "--device",
        choices=sorted(DEVICES),
        action="append",
        help="given once for each GPU where they are not alike (default: this machine's, or H200)",
    )
    case.add_argument(
        "--link", choices=list(LINKS), help="(default: this machine's, or what GPUs of it have)"
    )
    case.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="exact",
        help="fast: sums and exchanges in 8 bits, but over NVLink (default exact)",
    )
    case.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="of weights that each GPU may hold; the rest is read from the host's memory at every "
        "step (default: what this machine's have room for; else all)",
    )


def run(options: argparse.Namespace) -> None:
    """Show the layers, or predict."""
    if options.predict:
        _predict(options)
        return
    if options.file is None:
        raise InputError("'plan' needs a model file; with --predict, --model NAME will do.")
    info = inspect_checkpoint(options.file)
    sizes = ", ".join(map(str, info.valid_tp_sizes()))
    print(f"{info.label}, {info.num_parameters / 1e9:.3f} B parameters; TP sizes: {sizes}")
    info.check_tp_size(options.tp)
    found = model_footprint(info, options.tp)
    layers, quantisation = found.layers, found.quantisation
    quantised = f"   {'weights':28} {'scales':26} compute" if info.quantised else ""
    print(f"{'layer':58} {'style':12} {'full (in, out)':>16} {'local':>16}{quantised}")
    for layer in layers:
        style, local = type(layer.match.style).__name__, layer.local(options.tp)
        weights = f"   {_weights(layer, quantisation)}" if info.quantised else ""
        print(f"{_layer_name(layer):58} {style:12} {layer.full!s:>16} {local!s:>16}{weights}")
    print(f"{len(layers)} layers stand for {sum(len(x.replaced) for x in layers)} linears.")
    even = info.num_parameters / options.tp
    for rank, share in enumerate(found.shares):
        print(
            f"rank {rank}: holds {share.held / 1e9:.3f} B parameters ({share.held / even:.3f} of "
            f"1/{options.tp}), reads {share.read / 1e9:.3f} B"
        )
    if info.quantised:
        _show_quantisation(info, found, options.tp)


def _weights(layer: Layer, quantisation: Quantisation) -> str:
    """How a layer's weight is held, its scales, and how it is multiplied."""
    layer_format = quantisation.held.get(layer.path)
    if layer_format is None:
        why = quantisation.dequantised.get(layer.path)
        held = "plain" if why is None else "dequantised"
        return f"{held:28} {'-':26} {'as it is' if why is None else f'as it is: {why}'}"
    words = {
        "weight_scale": "rows",
        "block_scale": f"blocks of {layer_format.block}",
        "pre_quant_scale": "inputs",
    }
    scales = ", ".join(words.get(name, name) for name in layer_format.companions)
    compute = layer_format.compute(_capability(), quantised_products())
    return f"{layer_format.label:28} {scales:26} {compute}"


def _show_quantisation(info: CheckpointInfo, found: Footprint, tp_size: int) -> None:
    """Bytes, and what layers cost that are held dequantised."""
    file = info.weight_bytes(PLAIN_BYTES)
    (share, *_), dequantised = found.shares, found.quantisation.dequantised
    ratio = share.held_bytes * tp_size / file
    print(f"each rank: {share.held_bytes / 1e9:.3f} GB of weights ({ratio:.3f} of 1/{tp_size})")
    for why, count in Counter(dequantised.values()).items():
        size = sum(
            PLAIN_BYTES * math.prod(layer.local(tp_size))
            for layer in found.layers
            if dequantised.get(layer.path) == why
        )
        layers = "1 layer is" if count == 1 else f"{count} layers are"
        print(f"{layers} held dequantised, in bf16 {size / 1e9:.3f} GB a rank, as {why}.")


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _predict(options: argparse.Namespace) -> None:
    if (options.file is None) == (options.model is None):
        raise InputError("'plan --predict' needs either a model file or --model NAME.")
    check_counts({"GPUs": options.tp, "latents": options.batch, "text tokens": options.text})
    if options.gpu_memory is not None and not 0 < options.gpu_memory < math.inf:
        raise InputError(f"--gpu-memory is {options.gpu_memory}: give GiB above 0, such as 7.5.")
    if options.file is not None:
        info = inspect_checkpoint(options.file)
        family, sizes = info.family, info.sizes
        weight_bytes = info.weight_bytes(info.held_itemsize())
    else:
        family = families()[options.model]
        sizes = family.published
        weight_bytes = PLAIN_BYTES * sizes.table.num_elements
    extent = _extent(options, family, sizes)
    devices = _devices(options)
    usual = native_workload_of(family, sizes)
    every_layout = layouts(sizes, options.tp, shares_tokens=family.shares_tokens)
    limits = {at: _weight_limit(options, bytes_beside(sizes, usual, at)) for at in every_layout}
    if options.link is not None:
        link = LINKS[options.link]
    elif options.device is None and torch.cuda.device_count() > 1:
        link = link_between(range(torch.cuda.device_count()), LinkRecords.of_home())
    else:
        links = (usual_link(device, peers=device.nvlink) for device in devices)
        link = min(links, key=lambda one: one.rate)
    shape = options.batch, *sizes.geometry.latent_shape(*extent)
    workload = Workload(shape, options.text)
    print(
        f"{family.label}, {_said(family, extent)}, batch {options.batch}, {options.text} text "
        f"tokens, bf16. Predicted ms per evaluation on {options.tp} GPUs:"
    )
    for device in devices:
        print(f"  GPU {device.name}: {device.source}")
    if len(devices) > 1:
        print("  Every GPU has an equal share: the times are those of the slowest.")
    print(f"  link {link.name}: {link.source}")
    if options.precision == "fast":
        said = "what it does in any case" if link.fused else _EIGHT_BITS
        print(f"  precision fast: the link carries {said}")
    parts = [part.name for part in dataclasses.fields(Prediction)]
    if None in limits.values():
        parts.remove("streaming")
    else:
        rate = link.host_rate or min(device.host_rate for device in devices)
        print(
            f"  weights: {weight_bytes / _GIB:.1f} GiB over TP size; what a GPU does not hold is "
            f"read from the host's memory, at {rate / 1e9:.0f} GB/s"
        )
    print(" ".join(f"{title:>11}" for title in ("layout", "ms", *parts)))
    for layout, limit in limits.items():
        try:
            streamed = streamed_bytes(family.label, sizes, layout.tp_size, weight_bytes, limit)
        except SizeError as error:
            print(f"{layout!s:>11} {error}")
            continue
        each = [
            predict(
                sizes,
                workload,
                layout,
                device,
                link,
                precision=options.precision,
                streamed=streamed,
            )
            for device in devices
        ]
        found = max(each, key=lambda one: one.ms)
        times = (found.ms, *(getattr(found, part) for part in parts))
        read = []
        if limit is not None and streamed:
            read = [f"  holds {limit / _GIB:.1f} GiB, reads {streamed / _GIB:.1f} GiB"]
        print(f"{layout!s:>11}", *(f"{ms:11.1f}" for ms in times), *read)


def _extent(options: argparse.Namespace, family: Family, sizes: Sizes) -> Extent:
    """What is made: as asked for, else what the family usually makes. Raises InputError."""
    *usual_size, usual_frames = family.extents[0]
    width, height = options.size or usual_size
    frames = usual_frames if options.frames is None else options.frames
    check_size(width, height, sizes.geometry.downscale)
    check_counts({"frames": frames})
    if usual_frames == 1 < frames:
        raise InputError(f"--frames is {frames}, but {family.label} makes pictures: leave it out.")
    return width, height, frames


def _said(family: Family, extent: Extent) -> str:
    """An extent in words; of a model of videos with the frames."""
    width, height, frames = extent
    if family.extents[0][2] == 1:
        return f"{width} x {height}"
    return f"{width} x {height} x {frames} {'frame' if frames == 1 else 'frames'}"


def _devices(options: argparse.Namespace) -> list[Device]:
    """The kinds of the GPUs: of those that are named, of this machine's best, or an H200."""
    if options.device is None:
        own = devices_of(_own_gpus(options.tp), LinkRecords.of_home().speeds())
        return own or [DEVICES["H200"]]
    if len(options.device) not in (1, options.tp):
        raise InputError(
            f"{len(options.device)} GPUs are named by --device, but --tp is {options.tp}: give one "
            "for all of them, or one for each."
        )
    return [DEVICES[name] for name in dict.fromkeys(options.device)]


def _weight_limit(options: argparse.Namespace, computed_bytes: float) -> int | None:
    """Bytes of weights that a GPU may hold: as asked for, or as this machine's can; None: all.

    ``computed_bytes``: as of ``fitting_weights``.
    """
    if options.gpu_memory is not None:
        return int(options.gpu_memory * _GIB)
    gpus = _own_gpus(options.tp) if options.device is None else []
    fitting = (fitting_weights(gpu.memory, computed_bytes) for gpu in gpus)
    return gpu_memory() or min(fitting, default=None)


def _own_gpus(count: int) -> list[Gpu]:
    """The best of this machine's, at most so many."""
    visible = gpus_of(range(torch.cuda.device_count()))
    return best_first(visible, LinkRecords.of_home().speeds())[:count]


def _layer_name(layer: Layer) -> str:
    if layer.replaced == (layer.path,):
        return layer.path
    return f"{layer.path} <- {', '.join(layer.match.names)}"
