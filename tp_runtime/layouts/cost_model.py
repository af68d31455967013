"""Predicts how long one evaluation of a model takes, before anything runs. Client half; no GPU.

    predict("flux", config, latent_shape=(2, 16, 128, 128), text_tokens=512, tp_size=2).ms

``docs/scaling.md`` says where the formulae and constants come from, and how far off they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..config import Layout
from ..models import family
from ..sharding.block_costs import Stage

BYTES = 2  # of an element: activations and weights in bf16
PATCH = 2  # latent rows and columns of one token, in every family

# Calibrated once for all devices and models.
TILE = 128  # rows and columns of a result that one multiprocessor works on at a time
START = 450  # inner features whose time a tile needs to start and to write its result
KERNEL_S = 2e-6  # of each kernel of a recorded step, beyond its work
REQUEST_S = 1.5e-3  # ComfyUI's process to the ranks and back, with the latents
BARRIERS_S = 8e-6  # the two around a fused sum
NCCL_S = 8.4e-6  # of a collective through NCCL, beside its hops
SMALL_COLLECTIVES = 4  # in a step, outside the blocks: modulation, time embedding, last norm
END_PASSES = 8  # over all tokens, on every rank: embedding, first and last norm


@dataclass(frozen=True)
class Device:
    """A kind of GPU. Rates: ``matmul`` and ``attention`` FLOP/s, ``memory`` bytes/s.

    ``multiprocessors``: a kernel's work is dealt out to them in whole tiles. ``source``: of the
    rates. With the rates of a stranger, times are good to compare layouts with and no more.
    """

    name: str
    matmul: float
    attention: float
    memory: float
    multiprocessors: int
    source: str


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a tensor-parallel group, at its slowest place.

    ``rate``: bytes/s that a GPU sends while it receives as much. ``hop_s``: from one GPU to the
    next in NCCL's ring. ``fused``: GPUs work in each other's memory, so that a sum, the residual
    and the norm are one kernel.
    """

    name: str
    rate: float
    hop_s: float
    fused: bool
    source: str


DEVICES = {
    "H200": Device("H200", 820e12, 615e12, 3.0e12, 132, "measured"),
    "H100": Device(
        "H100", 820e12, 520e12, 2.1e12, 132, "as H200, memory by the data sheets; not measured"
    ),
    "other": Device("other", 820e12, 615e12, 2.1e12, 132, "a guess: only relations count"),
}
LINKS = {
    "nvlink": Link(
        "nvlink", 320e9, 3.4e-6, True, "measured on 2 and 4 H200s (18 links of NVLink 4)"
    ),
    "pcie": Link(
        "pcie", 25e9, 5.7e-6, False, "PCIe 4.0 x16: four fifths of its 31.5 GB/s; not measured"
    ),
    "pcie-host": Link(
        "pcie-host", 12e9, 5.7e-6, False, "through the host's memory: half of pcie; a guess"
    ),
    # Hosts of eight: one hop in eight is over the network.
    "network": Link(
        "network", 300e9, 4.7e-6, False, "a 400 Gb/s port for each GPU of a host; not measured"
    ),
    "network-1": Link(
        "network-1", 45e9, 4.7e-6, False, "one 400 Gb/s port for a host; not measured"
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one evaluation, by what they are spent on; ``ms`` is their sum.

    ``elementwise``: passes over memory, and norms. ``links``: moving data between GPUs, and waiting
    for one another. ``fixed``: the way to the ranks, and the start of kernels.
    """

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    links: float = 0.0
    fixed: float = 0.0

    @property
    def ms(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: "Prediction") -> "Prediction":
        return Prediction(
            *(getattr(self, part.name) + getattr(other, part.name) for part in fields(self))
        )


def device_of(name: str) -> Device:
    """The device that torch calls ``name``; "other" if it is none of the known."""
    return next((device for key, device in DEVICES.items() if key in name), DEVICES["other"])


def image_tokens(latent_shape: Sequence[int]) -> int:
    """Tokens of one latent (..., H, W)."""
    height, width = latent_shape[-2:]
    return -(-height // PATCH) * -(-width // PATCH)


def layouts(family_name: str, config: Mapping[str, Any], num_gpus: int) -> list[Layout]:
    """Every layout of that many GPUs that the model can be split over."""
    sizes = family(family_name).plan(config).valid_tp_sizes(num_gpus)
    return [Layout(size, num_gpus // size) for size in reversed(sizes) if num_gpus % size == 0]


def predict(
    family_name: str,
    config: Mapping[str, Any],
    latent_shape: Sequence[int],
    text_tokens: int,
    tp_size: int,
    batch_groups: int = 1,
    device: Device = DEVICES["H200"],
    link: Link = LINKS["nvlink"],
    references: Sequence[Sequence[int]] = (),
) -> Prediction:
    """One evaluation on ``tp_size`` x ``batch_groups`` GPUs.

    ``family_name`` and ``config``: of a ``CheckpointInfo``. ``latent_shape`` (B, ..., H, W): the
    forward batch, which is dealt out to the groups; the fullest sets the time. ``references``:
    shapes of reference latents. Does not check that the model can be split over ``tp_size``.
    """
    image = sum(image_tokens(shape) for shape in (latent_shape, *references))
    batch = -(-latent_shape[0] // batch_groups)
    stages = family(family_name).stages(config, image, text_tokens)
    total = Prediction(fixed=1e3 * REQUEST_S)
    for stage in stages:
        total += _blocks(stage, batch, tp_size, device, link)
    last = stages[-1]
    ends = END_PASSES * BYTES * batch * last.tokens * last.width
    total += Prediction(elementwise=1e3 * ends / device.memory)
    if tp_size > 1:
        features = sum(s.count * len(s.streams) * s.modulation[1] for s in stages)
        small = SMALL_COLLECTIVES * _nccl_s(0, tp_size, link)
        gathered = BYTES * batch * features * (tp_size - 1) / tp_size / link.rate
        total += Prediction(links=1e3 * (small + gathered))
    return total


def _blocks(stage: Stage, batch: int, tp_size: int, device: Device, link: Link) -> Prediction:
    heads, ffn = stage.heads.local(tp_size), stage.ffn.local(tp_size)
    rows = batch * stage.tokens
    size = BYTES * rows * stage.width  # of all tokens
    num_streams = len(stage.streams)
    # Streams lie behind one another: from the second item on, a stream is not one stretch of
    # memory. Its items are multiplied one by one.
    apart = num_streams > 1 and batch > 1

    matmul, kernels = 0.0, 0
    for tokens, inputs, outputs in stage.products(tp_size):
        count, height = (batch, tokens) if apart else (1, batch * tokens)
        matmul += count * _product_s(height, inputs, outputs, device)
        kernels += 1
    inputs, outputs = stage.modulation
    matmul += num_streams * _product_s(batch, inputs, -(-outputs // tp_size), device)

    # q and k (and v, to bring the streams together) are read and written; so is the MLP's middle.
    passes = heads * (4 if num_streams == 1 else 6) + ffn * (3 if stage.gated else 2)
    passes += 2 * heads if stage.parallel else 0  # attention's result goes beside the MLP's
    elementwise = BYTES * rows * passes / device.memory
    kernels += 3 * num_streams + 1 + stage.joins  # modulation, rotation, activation; attention

    links = 0.0
    whole = 4 * size / device.memory  # tokens and update read, tokens and their norm written
    if tp_size == 1:
        elementwise += stage.joins * whole
    elif link.fused:
        moved = 2 * size * (tp_size - 1) / tp_size / link.rate
        links += stage.joins * (BARRIERS_S + max(moved, whole / tp_size))
    else:
        links += stage.joins * num_streams * _nccl_s(size / num_streams, tp_size, link)
        elementwise += stage.joins * whole * num_streams  # with two, they are put together again
    attention = _attention_s(stage, batch, heads, device)
    of_one = (matmul, attention, elementwise, links, kernels * KERNEL_S)
    return Prediction(*(1e3 * stage.count * seconds for seconds in of_one))


def _product_s(rows: int, inputs: int, outputs: int, device: Device) -> float:
    """(rows, inputs) times (inputs, outputs): arithmetic in whole tiles, or memory.

    Tiles for less than all multiprocessors are split along the inner features.
    """
    tiles = math.ceil(rows / TILE) * math.ceil(outputs / TILE)
    work = 2 * TILE**2 * (inputs * tiles + START * max(tiles, device.multiprocessors))
    traffic = BYTES * (rows * inputs + inputs * outputs + rows * outputs)
    return max(work / device.matmul, traffic / device.memory)


def _attention_s(stage: Stage, batch: int, width: int, device: Device) -> float:
    """Queries of a head in tiles, each on a multiprocessor: with fewer tiles, some have no work."""
    tiles = math.ceil(stage.tokens / TILE) * batch * width // stage.heads.unit
    work = 4 * TILE * stage.tokens * stage.heads.unit * max(tiles, device.multiprocessors)
    return work / device.attention


def _nccl_s(size: float, tp_size: int, link: Link) -> float:
    """NCCL's ring: each GPU sends 2 (T-1)/T of the bytes in 2 (T-1) hops."""
    return NCCL_S + 2 * (tp_size - 1) * (link.hop_s + size / tp_size / link.rate)
