"""Which layout ``auto`` takes for a model on this machine.

By what the model is used for, or made for until it is: steps that were measured here
(``step_history``), and predictions (``cost_model``) for the layouts that were not.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import (
    ROOM_BYTES,
    ROOM_FACTOR,
    Layout,
    Precision,
    cuda_index,
    device_name,
    device_names,
    gpu_names,
    may_access_peers,
)
from ..recognise import CheckpointInfo
from .cost_model import Device, Link, device_of, predict, usual_link
from .gpus import Gpu, are_alike, best_first, devices_of, gpus_of
from .link_records import LinkRecords
from .step_history import StepRecords, Workload, times_of

MIN_GAIN = 0.05  # a layout other than the default must be so much faster


@dataclass(frozen=True)
class Estimate:
    """What a step of a sampler takes in one layout, in ms; ``measured`` here, or else predicted."""

    ms: float
    measured: bool

    def __str__(self) -> str:
        return f"{self.ms:.0f} ms {'measured' if self.measured else 'predicted'}"


def estimate(
    layouts: Iterable[Layout],
    measured: Mapping[Layout, float],
    predict: Callable[[Layout], float] | None,
) -> dict[Layout, Estimate]:
    """What is known of each layout, in ms per step.

    Predictions are scaled to the measurements that there are: the machine may be slower, or do
    more in a step, than the model of its costs knows. Without ``predict``, what was not measured
    has no entry.
    """
    found = {layout: Estimate(measured[layout], True) for layout in layouts if layout in measured}
    if predict is not None:
        ratios = [ms / predict(layout) for layout, ms in measured.items()]
        scale = statistics.geometric_mean(ratios) if ratios else 1.0
        for layout in layouts:
            found.setdefault(layout, Estimate(scale * predict(layout), False))
    return found


def fastest(default: Layout, estimates: Mapping[Layout, Estimate]) -> Layout:
    """The layout to take: ``default``, unless another one is faster by more than ``MIN_GAIN``.

    What is predicted must be so much faster than what was measured, too.
    """
    if default not in estimates:
        return default
    chosen = default
    for measured in (True, False):
        of_kind = {layout: one.ms for layout, one in estimates.items() if one.measured is measured}
        best = min(of_kind, key=of_kind.__getitem__, default=default)
        if estimates[best].ms < (1 - MIN_GAIN) * estimates[chosen].ms:
            chosen = best
    return chosen


@dataclass(frozen=True)
class Choice:
    """A layout, and the GPUs that it takes, none on the CPU.

    ``reason`` says why it is not the default, which other one is to be tried, and what GPUs that
    are not alike mean for it; None: there is nothing to say.
    """

    layout: Layout
    gpus: tuple[int, ...]
    reason: str | None = None


def choose_layout(
    info: CheckpointInfo,
    layouts: Sequence[Layout],
    gpus: Sequence[int],
    records: StepRecords,
    links: LinkRecords,
    precision: Precision = "exact",
) -> Choice:
    """The fastest of ``layouts`` for what the model is used for; the first is the default.

    Before its first use, for what it is made for. ``gpus``: those that may be used, empty on the
    CPU, where nothing is predicted. Where they are not connected by NVLink, what is predicted to be
    the fastest for what the model is made for takes the default's place. Of GPUs that are not
    alike, a layout takes the fastest, or the largest of those as fast. ``precision``: what links
    carry; only times with the same count.
    """
    plain, native = layouts[0], native_workload(info)
    speeds = links.speeds()
    ordered = best_first(gpus_of(gpus), speeds)

    def taken(layout: Layout) -> list[Gpu]:
        return ordered[: layout.num_gpus]

    def times_name(layout: Layout) -> str:
        return times_of(device_names(gpu.number for gpu in taken(layout)), precision)

    def chosen(layout: Layout, *reasons: str) -> Choice:
        said = " ".join(filter(None, (*reasons, _of_unlike(ordered, layout.num_gpus))))
        return Choice(layout, tuple(gpu.number for gpu in taken(layout)), said or None)

    names = dict.fromkeys(map(times_name, layouts))
    usual = next(filter(None, (records.usual_workload(info.path, name) for name in names)), None)
    if len(layouts) == 1 or not (usual or gpus):
        return chosen(plain)
    link = link_between(gpus, links) if gpus else None
    workload = usual or native
    measured = {
        layout: ms
        for name in names
        for layout, ms in records.times(info.path, name, workload).items()
        if times_name(layout) == name
    }
    # On the CPU, where ranks share the cores, nothing is to be had by sharing tokens.
    possible = [
        one
        for one in layouts
        if (_fits(info, one, taken(one)) if gpus else one == plain or one.sequence_size == 1)
    ] or [plain]
    if plain not in possible:  # it needs a GPU that is smaller than the others
        plain = max(possible, key=lambda one: (-one.batch_groups, -one.sequence_size, one.tp_size))

    def useful(of: Workload) -> list[Layout]:
        return [one for one in possible if one == plain or one.batch_groups <= of.batch]

    kinds = devices_of((gpu.name for gpu in ordered), speeds)

    def predictor(of: Workload) -> Callable[[Layout], float] | None:
        if link is None:
            return None

        def on_slowest(layout: Layout) -> float:
            names = (gpu.name for gpu in taken(layout))
            here = kinds if len(kinds) == 1 else devices_of(names, speeds)
            return max(_predicted_ms(info, of, kind, link, precision, layout) for kind in here)

        return on_slowest

    default = plain
    if link is not None and not link.fused:
        predicted = estimate(useful(native), {}, predictor(native))
        default = min(predicted, key=lambda layout: predicted[layout].ms)
    estimates = estimate(useful(workload), measured, predictor(workload))
    layout = fastest(default, estimates)
    if layout == plain == layouts[0]:
        return chosen(plain)
    of_three = "sequence size x " if layout.sequence_size > 1 else ""
    why = f" The GPUs' link is {link.name} ({link.source})." if link is not None else ""
    others = f", and {plain} takes {estimates[plain]}" if layout != plain else ""
    return chosen(
        layout,
        f"'auto' takes the layout {layout} (TP size x {of_three}batch groups): "
        f"{estimates[layout]} a step{others}, for latents of "
        f"{workload.latent_shape} {'as of late' if usual else 'as usual for the model'}.{why} Set "
        "layout or gpu_count to decide yourself.",
    )


def _of_unlike(ordered: Sequence[Gpu], num_gpus: int) -> str:
    """What it means that the GPUs, the best first, are not alike; so many of them are used."""
    used, left = ordered[:num_gpus], ordered[num_gpus:]
    share = "every GPU has an equal share, so the slowest sets the pace, and the smallest what fits"
    if not are_alike(used):
        alike = [gpu for gpu in used if are_alike((used[0], gpu))]
        numbers = ",".join(str(gpu.number) for gpu in alike)
        return (
            f"The GPUs are not alike ({', '.join(map(str, used))}): {share}. devices={numbers} "
            "leaves the others out."
        )
    without = [gpu for gpu in left if not are_alike((used[0], gpu))] if used else []
    if not without:
        return ""
    which = ", ".join(map(str, without))
    return (
        f"Not used: GPU{'s' * (len(without) > 1)} {which}. They are not like the others: {share}."
    )


def native_workload(info: CheckpointInfo) -> Workload:
    """One picture or video of the size that the model is made for."""
    family = info.family
    shape = info.sizes.geometry.latent_shape(*family.extents[0])
    return Workload((1, *shape), family.text_tokens)


def _predicted_ms(
    info: CheckpointInfo,
    workload: Workload,
    device: Device,
    link: Link,
    precision: Precision,
    layout: Layout,
) -> float:
    return predict(
        info.sizes,
        workload.latent_shape,
        workload.text_tokens,
        layout.tp_size,
        layout.batch_groups,
        device,
        link,
        sequence_size=layout.sequence_size,
        precision=precision,
    ).ms


def link_between(gpus: Sequence[int], links: LinkRecords) -> Link:
    """What connects these GPUs, with the rates that were measured here, or likely ones."""
    likely = likely_link(gpus)
    rates = links.between(gpu_names(gpus))
    return likely if rates is None else rates.on(likely)


def likely_link(gpus: Sequence[int]) -> Link:
    """What is likely to connect these GPUs: torch tells whether they reach each other's memory.

    Those of data centres do it through NVLink. Of GPUs that are not alike, the slowest link.
    """
    import torch

    pairs = itertools.permutations({cuda_index(gpu) for gpu in gpus}, 2)
    peers = may_access_peers() and all(
        torch.cuda.can_device_access_peer(one, other) for one, other in pairs
    )
    of_each = [usual_link(device_of(device_name(gpu)), peers=peers) for gpu in gpus]
    return min(of_each, key=lambda link: link.rate)


def _fits(info: CheckpointInfo, layout: Layout, gpus: Sequence[Gpu]) -> bool:
    """Whether each GPU could hold its share of the weights, if nothing else were on it."""
    plain_fp8 = not info.quantised and any(t.dtype.startswith("F8") for t in info.tensors.values())
    share = info.weight_bytes(itemsize=1 if plain_fp8 else 2) / layout.tp_size
    return share * ROOM_FACTOR + ROOM_BYTES <= min(gpu.memory for gpu in gpus)
