"""Predicts how long one evaluation of a model takes, before anything runs. Needs no GPU.

    predict(info.sizes, latent_shape=(2, 16, 128, 128), text_tokens=512, tp_size=2).ms

``docs/scaling.md`` says where the formulae and constants come from, and how far off they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..config import Layout
from ..models.family import Sizes
from ..sharding.block_costs import AttentionCosts, BlockCosts

BYTES = 2  # of an element: activations and weights in bf16

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


def layouts(sizes: Sizes, num_gpus: int) -> list[Layout]:
    """Every layout of that many GPUs that the model can be split over."""
    valid = sizes.table.plan.valid_tp_sizes(num_gpus)
    return [Layout(size, num_gpus // size) for size in reversed(valid) if num_gpus % size == 0]


def predict(
    sizes: Sizes,
    latent_shape: Sequence[int],
    text_tokens: int,
    tp_size: int,
    batch_groups: int = 1,
    device: Device = DEVICES["H200"],
    link: Link = LINKS["nvlink"],
    references: Sequence[Sequence[int]] = (),
) -> Prediction:
    """One evaluation on ``tp_size`` x ``batch_groups`` GPUs.

    ``sizes``: of a ``CheckpointInfo``. ``latent_shape`` (B, ..., H, W): the forward batch, which is
    dealt out to the groups; the fullest sets the time. ``references``: shapes of reference latents.
    Does not check that the model can be split over ``tp_size``.
    """
    geometry = sizes.geometry
    image, *others = (
        geometry.image_tokens(tuple(shape[1:])) for shape in (latent_shape, *references)
    )
    if geometry.references_once:
        text_tokens += sum(others)
    else:
        image += sum(others)
    batch = -(-latent_shape[0] // batch_groups)
    blocks = sizes.table.block_costs(geometry.padded(text_tokens), geometry.padded(image))
    total = Prediction(fixed=1e3 * REQUEST_S)
    for block in blocks:
        total += _blocks(block, batch, tp_size, device, link)
    last = blocks[-1]
    ends = END_PASSES * BYTES * batch * last.tokens * last.width
    total += Prediction(elementwise=1e3 * ends / device.memory)
    if tp_size > 1:
        features = sum(b.count * linear.full[1] for b in blocks for linear in b.modulations)
        small = SMALL_COLLECTIVES * _nccl_s(0, tp_size, link)
        gathered = BYTES * batch * features * (tp_size - 1) / tp_size / link.rate
        total += Prediction(links=1e3 * (small + gathered))
    return total


def _blocks(block: BlockCosts, batch: int, tp_size: int, device: Device, link: Link) -> Prediction:
    rows = batch * block.tokens
    size = BYTES * rows * block.width  # of all tokens
    num_streams = len(block.streams)
    # Streams lie behind one another: from the second item on, a stream is not one stretch of
    # memory. Its items are multiplied one by one.
    apart = num_streams > 1 and batch > 1

    matmul, moved_features = 0.0, 0
    for linear in block.linears:
        inputs, outputs = linear.local(tp_size)
        count, height = (batch, linear.rows) if apart else (1, batch * linear.rows)
        matmul += count * _product_s(height, inputs, outputs, device)
        # What it gives is read again, and what a row-parallel linear is given was written.
        moved_features += linear.rows * (inputs if linear.axis == 1 else outputs)
    for linear in block.modulations:
        matmul += _product_s(batch, *linear.local(tp_size), device)
    # Streams are brought together for attention; and its result goes beside the MLP's.
    heads = sum(one.queries * one.heads.local(tp_size) for one in block.attentions)
    moved_features += 2 * heads * ((num_streams > 1) + block.parallel)
    elementwise = BYTES * batch * moved_features / device.memory
    # Each linear; modulation, rotation, activation; attention.
    kernels = len(block.linears) + 3 * num_streams + len(block.attentions) + block.joins

    links = 0.0
    whole = 4 * size / device.memory  # tokens and update read, tokens and their norm written
    if tp_size == 1:
        elementwise += block.joins * whole
    elif link.fused:
        moved = 2 * size * (tp_size - 1) / tp_size / link.rate
        links += block.joins * (BARRIERS_S + max(moved, whole / tp_size))
    else:
        links += block.joins * num_streams * _nccl_s(size / num_streams, tp_size, link)
        elementwise += block.joins * whole * num_streams  # with two, they are put together again
    attention = sum(_attention_s(one, batch, tp_size, device) for one in block.attentions)
    of_one = (matmul, attention, elementwise, links, kernels * KERNEL_S)
    return Prediction(*(1e3 * block.count * seconds for seconds in of_one))


def _product_s(rows: int, inputs: int, outputs: int, device: Device) -> float:
    """(rows, inputs) times (inputs, outputs): arithmetic in whole tiles, or memory.

    Tiles for less than all multiprocessors are split along the inner features.
    """
    tiles = math.ceil(rows / TILE) * math.ceil(outputs / TILE)
    work = 2 * TILE**2 * (inputs * tiles + START * max(tiles, device.multiprocessors))
    traffic = BYTES * (rows * inputs + inputs * outputs + rows * outputs)
    return max(work / device.matmul, traffic / device.memory)


def _attention_s(one: AttentionCosts, batch: int, tp_size: int, device: Device) -> float:
    """Queries of a head in tiles, each on a multiprocessor: with fewer tiles, some have no work."""
    tiles = math.ceil(one.queries / TILE) * batch * one.heads.local_count(tp_size)
    work = 4 * TILE * one.keys * one.heads.unit * max(tiles, device.multiprocessors)
    return work / device.attention


def _nccl_s(size: float, tp_size: int, link: Link) -> float:
    """NCCL's ring: each GPU sends 2 (T-1)/T of the bytes in 2 (T-1) hops."""
    return NCCL_S + 2 * (tp_size - 1) * (link.hop_s + size / tp_size / link.rate)
