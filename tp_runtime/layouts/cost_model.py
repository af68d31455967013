"""Predicts how long one evaluation of a model takes, before anything runs. Needs no GPU.

    predict(info.sizes, Workload((2, 16, 128, 128), text_tokens=512), Layout(2)).ms

``docs/scaling.md`` says where the formulae and constants come from, and how far off they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ..config import EXCHANGE_TURNS, Layout, Precision, exchange_turns
from ..models.family import Sizes
from ..sharding.block_costs import AttentionCosts, BlockCosts
from .step_history import Workload

BYTES = 2  # of an element: activations and weights in bf16
CODED = (1 + 2 / 32) / BYTES  # of these, in 8 bits with their scales (``gpu/block_codes``)

# Calibrated once for all devices and models.
TILE = 128  # rows and columns of a result that one multiprocessor works on at a time
START = 450  # inner features whose time a tile needs to start and to write its result
KERNEL_S = 2e-6  # of each kernel of a recorded step, beyond its work
REQUEST_S = 1.5e-3  # ComfyUI's process to the ranks and back, with the latents
BARRIERS_S = 8e-6  # the two around a fused sum
NCCL_S = 8.4e-6  # of a collective through NCCL, beside its hops
SMALL_COLLECTIVES = 4  # in a step, outside the blocks: modulation, time embedding, last norm
# Of q, k and v in an exchange: by ranks, behind one another, as tokens. Of attention's result.
COPIES_TO_ATTENTION, COPIES_BACK = 3, 2
END_PASSES = 8  # over all tokens, on every rank: embedding, first and last norm
HIDING = 4  # how well reading weights and computing hide one another: the power of their norm
# Bytes/s from page-locked memory of the host, by the generation of a slot with 16 lanes.
HOST_RATES = {4: 25e9, 5: 54e9}


@dataclass(frozen=True)
class Device:
    """A kind of GPU. Rates: ``matmul`` and ``attention`` FLOP/s, ``memory`` bytes/s.

    ``multiprocessors``: a kernel's work is dealt out to them in whole tiles. ``source``: of the
    rates. ``pcie``: the generation of its slot; ``nvlink``: GPUs of the kind that reach each
    other's memory do it so.
    """

    name: str
    matmul: float
    attention: float
    memory: float
    multiprocessors: int
    source: str
    pcie: int = 5
    nvlink: bool = True

    @property
    def host_rate(self) -> float:
        """Bytes/s that it reads from the host's memory, if all lanes of its slot are there."""
        return HOST_RATES[self.pcie]


@dataclass(frozen=True)
class Link:
    """What connects the GPUs of a group, at its slowest place.

    ``rate``: bytes/s that a GPU sends in a sum while it receives as much; ``exchange_rate``: when
    each gives every other one its part. ``hop_s``: from one GPU to the next in NCCL's ring.
    ``fused``: GPUs work in each other's memory, so that a sum, the residual and the norm are one
    kernel. ``host_rate``: bytes/s that each GPU reads from the host's memory while all of them do;
    None: as its slot lets it. ``turns``: exchanges that the heads of an attention go in
    at most (``config.exchange_turns``), each while attention of others is computed.
    ``exchange_total``: bytes/s that all GPUs together send in exchanges; None: no bound is known.
    """

    name: str
    rate: float
    exchange_rate: float
    hop_s: float
    fused: bool
    source: str
    host_rate: float | None = None
    turns: int = 1
    exchange_total: float | None = None

    def among(self, num_gpus: int) -> "Link":
        """What each of so many GPUs has of it while all exchange."""
        if self.exchange_total is None:
            return self
        return replace(self, exchange_rate=min(self.exchange_rate, self.exchange_total / num_gpus))


def by_data_sheet(
    name: str,
    tflops: float,
    memory: float,
    multiprocessors: int,
    pcie: int,
    *,
    nvlink: bool = False,
    of: str = "the data sheet's numbers",
) -> Device:
    """Of dense products in bf16 with sums in fp32, and of memory: what an H200 reaches of its own.

    Which are 989 TFLOP/s and 4.8e12 bytes/s.
    """
    matmul, attention = (tflops * 1e12 * reached / 989e12 for reached in (820e12, 615e12))
    source = f"the H200's shares of {of}; not measured"
    reached = memory * 3.0 / 4.8
    return Device(name, matmul, attention, reached, multiprocessors, source, pcie, nvlink)


# By a part of the name that torch tells.
DEVICES = {
    "H200": Device("H200", 820e12, 615e12, 3.0e12, 132, "measured"),
    "H100": Device("H100", 820e12, 600e12, 2.4e12, 132, "as H200; attention and memory measured"),
    "RTX PRO 6000": by_data_sheet("RTX PRO 6000", 503.8, 1.792e12, 188, pcie=5),
    "RTX 5090": by_data_sheet("RTX 5090", 209.5, 1.792e12, 170, pcie=5),
    "RTX 5080": by_data_sheet("RTX 5080", 112.6, 0.960e12, 84, pcie=5),
    "RTX 5070 Ti": by_data_sheet("RTX 5070 Ti", 87.9, 0.896e12, 70, pcie=5),
    "RTX 4090": by_data_sheet("RTX 4090", 165.2, 1.008e12, 128, pcie=4),
    "RTX 4080": by_data_sheet("RTX 4080", 97.5, 0.717e12, 76, pcie=4),
    "RTX 4070 Ti": by_data_sheet("RTX 4070 Ti", 80.2, 0.504e12, 60, pcie=4),
    "RTX 4060 Ti": by_data_sheet("RTX 4060 Ti", 44.1, 0.288e12, 34, pcie=4),
    "RTX 3090": by_data_sheet("RTX 3090", 71.0, 0.936e12, 82, pcie=4),
    "RTX 3080": by_data_sheet("RTX 3080", 59.5, 0.760e12, 68, pcie=4),
    "RTX 3060": by_data_sheet("RTX 3060", 25.5, 0.360e12, 28, pcie=4),
}
LINKS = {
    "nvlink": Link(
        "nvlink",
        rate=320e9,
        exchange_rate=250e9,
        hop_s=3.4e-6,
        fused=True,
        source="sums measured on 2 and 4 H200s (18 links of NVLink 4)",
    ),
    "pcie": Link(
        "pcie",
        rate=25e9,
        exchange_rate=25e9,
        hop_s=5.7e-6,
        fused=False,
        source="PCIe 4.0 x16 with peer access: four fifths of its 31.5 GB/s; not measured",
    ),
    "pcie5": Link(
        "pcie5",
        rate=50e9,
        exchange_rate=50e9,
        hop_s=5.7e-6,
        fused=False,
        source="PCIe 5.0 x16 with peer access: twice pcie; not measured",
    ),
    "pcie-host": Link(
        "pcie-host",
        rate=12.5e9,
        exchange_rate=17.5e9,
        hop_s=5.7e-6,
        fused=False,
        source="PCIe 4.0 x16 through the host's memory: half of pcie5-host; not measured",
        turns=EXCHANGE_TURNS,
        exchange_total=45e9,
    ),
    "pcie5-host": Link(
        "pcie5-host",
        rate=25e9,
        exchange_rate=35e9,
        hop_s=5.7e-6,
        fused=False,
        source="PCIe 5.0 x16 through the host's memory: measured on 2 and 4 H100s and H200s "
        "without peer access",
        turns=EXCHANGE_TURNS,
        exchange_total=90e9,
    ),
    # Hosts of eight: one hop in eight is over the network.
    "network": Link(
        "network",
        rate=300e9,
        exchange_rate=45e9,
        hop_s=4.7e-6,
        fused=False,
        source="a 400 Gb/s port for each GPU of a host; not measured",
    ),
    "network-1": Link(
        "network-1",
        rate=45e9,
        exchange_rate=6e9,
        hop_s=4.7e-6,
        fused=False,
        source="one 400 Gb/s port for a host; not measured",
    ),
}


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one evaluation, by what they are spent on; ``ms`` is their sum.

    ``elementwise``: passes over memory, and norms. ``links``: moving data between GPUs, and waiting
    for one another. ``fixed``: the way to the ranks, and the start of kernels. ``streaming``:
    waiting for weights from the host's memory, beyond what the rest hides.
    """

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    links: float = 0.0
    fixed: float = 0.0
    streaming: float = 0.0

    @property
    def ms(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: "Prediction") -> "Prediction":
        return Prediction(
            *(getattr(self, part.name) + getattr(other, part.name) for part in fields(self))
        )


def device_of(name: str) -> Device | None:
    """The device that torch calls ``name``, if it is one of ``DEVICES``."""
    return next((device for key, device in DEVICES.items() if key in name), None)


def usual_link(device: Device, *, peers: bool) -> Link:
    """What connects GPUs of that kind; ``peers``: they reach each other's memory."""
    if peers and device.nvlink:
        return LINKS["nvlink"]
    generation = "pcie5" if device.pcie >= 5 else "pcie"
    return LINKS[generation if peers else f"{generation}-host"]


def layouts(sizes: Sizes, num_gpus: int, *, shares_tokens: bool = False) -> list[Layout]:
    """Every layout of that many GPUs that the model can be split over.

    ``shares_tokens``: of its ``Family``; with the layouts whose ranks do.
    """
    return [
        Layout(tp_size, num_gpus // (tp_size * sequence_size), sequence_size)
        for sequence_size in (range(1, num_gpus + 1) if shares_tokens else (1,))
        for tp_size in reversed(sizes.table.plan.valid_tp_sizes(num_gpus))
        if num_gpus % (tp_size * sequence_size) == 0
    ]


def predict(
    sizes: Sizes,
    workload: Workload,
    layout: Layout,
    device: Device = DEVICES["H200"],
    link: Link = LINKS["nvlink"],
    *,
    references: Sequence[Sequence[int]] = (),
    precision: Precision = "exact",
    streamed: float = 0,
) -> Prediction:
    """One evaluation of ``workload`` on GPUs that are alike.

    ``sizes``: of a ``CheckpointInfo``. The workload's batch is dealt out to the batch groups; the
    fullest sets the time. ``references``: shapes of reference latents. ``precision``: what links
    carry, but NVLink. ``streamed``: bytes of weights that each GPU reads from the host's memory
    (``room``). Does not check that the model can be split so.
    """
    tp_size, sequence_size = layout.tp_size, layout.sequence_size
    link, text_tokens = link.among(layout.num_gpus), workload.text_tokens
    geometry = sizes.geometry
    image, *others = (
        geometry.image_tokens(tuple(shape[1:])) for shape in (workload.latent_shape, *references)
    )
    if geometry.references_once:
        text_tokens += sum(others)
    else:
        image += sum(others)
    batch = -(-workload.batch // layout.batch_groups)
    blocks = sizes.table.block_costs(geometry.padded(text_tokens), geometry.padded(image))
    total = Prediction(fixed=1e3 * REQUEST_S)
    for block in blocks:
        total += predict_blocks(block, batch, tp_size, sequence_size, device, link, precision)
    last = blocks[-1]
    ends = END_PASSES * BYTES * batch * last.tokens * last.width
    total += Prediction(elementwise=1e3 * ends / device.memory)
    if tp_size > 1:
        features = sum(b.count * linear.full[1] for b in blocks for linear in b.modulations)
        small = SMALL_COLLECTIVES * nccl_s(0, tp_size, link)
        gathered = BYTES * batch * features * (tp_size - 1) / tp_size / link.rate
        total += Prediction(links=1e3 * (small + gathered))
    if sequence_size > 1:  # at the end, every rank has all of what the picture is made of
        whole = BYTES * batch * geometry.padded(image) * last.width
        total += Prediction(links=1e3 * _exchange_s(whole, sequence_size, link))
    return total + Prediction(streaming=_streaming_ms(streamed, total, device, link))


def _streaming_ms(streamed: float, rest: Prediction, device: Device, link: Link) -> float:
    """How much longer reading so many bytes makes what is computed meanwhile.

    The longer of both hides the other, but not all of it where they take about as long. What the
    GPUs send to one another needs the slot, too, unless NVLink connects them.
    """
    meanwhile = rest.ms - 1e3 * REQUEST_S - (0.0 if link.fused else rest.links)
    reading = 1e3 * streamed / (link.host_rate or device.host_rate)
    return float((reading**HIDING + meanwhile**HIDING) ** (1 / HIDING)) - meanwhile


def predict_blocks(
    block: BlockCosts,
    batch: int,
    tp_size: int,
    sequence_size: int,
    device: Device,
    link: Link,
    precision: Precision = "exact",
) -> Prediction:
    """So many equal blocks, on the rank that has most to do."""
    coded = precision == "fast" and not link.fused

    def share(tokens: int) -> int:
        return -(-tokens // sequence_size)

    size = BYTES * batch * sum(map(share, block.streams.values())) * block.width  # of the tokens
    num_streams = len(block.streams)
    # Streams lie behind one another: from the second item on, a stream is not one stretch of
    # memory. Its items are multiplied one by one.
    apart = num_streams > 1 and batch > 1

    matmul, moved_features = 0.0, 0
    for linear in block.linears:
        inputs, outputs = linear.local(tp_size)
        rows = share(linear.rows)
        count, height = (batch, rows) if apart else (1, batch * rows)
        matmul += count * _product_s(height, inputs, outputs, device)
        # What it gives is read again, and what a row-parallel linear is given was written.
        moved_features += rows * (inputs if linear.axis == 1 else outputs)
    for linear in block.modulations:
        matmul += _product_s(batch, *linear.local(tp_size), device)
    # Streams are brought together for attention; and its result goes beside the MLP's.
    heads = sum(share(one.queries) * one.heads.local(tp_size) for one in block.attentions)
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
    elif coded:
        links += block.joins * coded_sum_s(size, tp_size, device, link)
        elementwise += block.joins * whole * num_streams
        kernels += block.joins * (2 * num_streams + 1)
    else:
        links += block.joins * num_streams * nccl_s(size / num_streams, tp_size, link)
        elementwise += block.joins * whole * num_streams  # with two, they are put together again
    for one in block.attentions if sequence_size > 1 else ():
        to_it, back = (BYTES * batch * size for size in _exchanged(one, tp_size, sequence_size))
        if to_it:
            part = CODED if coded else 1
            computed = _attention_s(one, batch, tp_size, sequence_size, device)
            sizes = part * to_it, part * back
            turns = exchange_turns(sizes[0] / sequence_size**2, link.turns)
            links += _waiting_s(sizes, computed, sequence_size, link, turns)
            copied = COPIES_TO_ATTENTION * to_it + COPIES_BACK * back
            elementwise += 2 * copied / sequence_size / device.memory
            kernels += turns * (COPIES_TO_ATTENTION + COPIES_BACK)
            if coded:
                elementwise += 2 * (1 + CODED) * (to_it + back) / sequence_size / device.memory
                kernels += 4 * turns * (sequence_size - 1)
    attention = sum(
        _attention_s(one, batch, tp_size, sequence_size, device) for one in block.attentions
    )
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


def _attention_s(
    one: AttentionCosts, batch: int, tp_size: int, sequence_size: int, device: Device
) -> float:
    """Queries of a head in tiles, each on a multiprocessor: with fewer tiles, some have no work."""
    heads, queries = one.heads.local_count(tp_size), one.queries
    if one.passing:  # all tokens, for a share of the heads
        heads = math.ceil(heads / sequence_size)
    else:
        queries = math.ceil(queries / sequence_size)
    tiles = math.ceil(queries / TILE) * batch * heads
    work = 4 * TILE * one.keys * one.heads.unit * max(tiles, device.multiprocessors)
    return work / device.attention


def _exchanged(one: AttentionCosts, tp_size: int, sequence_size: int) -> tuple[int, int]:
    """Features of all tokens that change places: q, k and v before attention, its result after.

    Nothing, if what is looked at is no token that passes through the block.
    """
    if not one.passing:
        return 0, 0
    kv = one.kv_heads
    # As ``TokenShares.attention``: each head its own key, where a share may end between two.
    kv = one.heads if kv.local_count(tp_size) % sequence_size else kv
    back = one.queries * one.heads.local(tp_size)
    return back + 2 * one.passing * kv.local(tp_size), back


def _waiting_s(
    sizes: tuple[float, float], computed_s: float, sequence_size: int, link: Link, turns: int
) -> float:
    """How much longer attention takes for the exchanges before and after it, of so many bytes.

    In turns: the first comes, and the last goes, while nothing is computed; others go meanwhile.
    """
    before, after = (turns * _exchange_s(size / turns, sequence_size, link) for size in sizes)
    whole = max(
        computed_s + (before + after) / turns,
        before + (computed_s + after) / turns,
        before + after,
    )
    return whole - computed_s


def _exchange_s(size: float, sequence_size: int, link: Link) -> float:
    """All-to-all of ``size`` bytes of all ranks: each sends its share, less its own part of it.

    NCCL sends and receives to and from all others at once.
    """
    sent = size * (sequence_size - 1) / sequence_size**2
    return NCCL_S + link.hop_s + sent / link.exchange_rate


def coded_sum_s(size: float, tp_size: int, device: Device, link: Link) -> float:
    """In 8 bits, and in two steps: to the rank that adds them up, and from it to all.

    Each sends as many bytes as in NCCL's ring, of codes. They are made, added up and read in passes
    of their own.
    """
    sent = 2 * (tp_size - 1) / tp_size * CODED * size
    passes = (2 + (3 + 1 / tp_size) * CODED) * size
    return 2 * NCCL_S + tp_size * link.hop_s + sent / link.rate + passes / device.memory


def nccl_s(size: float, tp_size: int, link: Link) -> float:
    """NCCL's ring: each GPU sends 2 (T-1)/T of the bytes in 2 (T-1) hops."""
    return NCCL_S + 2 * (tp_size - 1) * (link.hop_s + size / tp_size / link.rate)
