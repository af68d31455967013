"""Which layout ``auto`` takes for a model on this machine.

By what the model is used for, or made for until it is: steps that were measured here
(``step_history``), and predictions (``cost_model``) for the layouts that were not, with the time
that reading weights takes where they do not fit (``room``).
"""

import functools
import itertools
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import (
    Layout,
    Precision,
    cuda_index,
    device_names,
    gpu_names,
    may_access_peers,
)
from ..models.family import Family, Sizes
from ..recognise import CheckpointInfo
from .cost_model import Link, predict, usual_link
from .gpus import Gpu, are_alike, best_first, devices_of, gpus_of
from .link_records import LinkRecords, Speed
from .room import Room, live_bytes
from .step_history import StepRecords, Workload, times_of

MIN_GAIN = 0.03  # a layout other than the default must be so much faster
_ADVICE = "Set layout or gpu_count to decide yourself."
MUCH_FASTER = 1.3  # alone, the better GPUs need no room for the largest usual latents
_GIB = 2**30


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


@dataclass(frozen=True)
class _Machine:
    """The GPUs that may be used, the best first, and what connects them. On the CPU: none."""

    gpus: Sequence[Gpu]
    speeds: Mapping[str, Speed]
    link: Link | None
    precision: Precision
    itemsize: int  # of the weights, as ``CheckpointInfo.held_itemsize``

    def taken(self, layout: Layout) -> Sequence[Gpu]:
        """The GPUs that a layout takes."""
        return self.gpus[: layout.num_gpus]

    def times_name(self, layout: Layout) -> str:
        """The name by which its times are kept."""
        names = device_names(gpu.number for gpu in self.taken(layout))
        return times_of(names, self.precision, self.itemsize)

    def predicted_ms(
        self, sizes: Sizes, workload: Workload, layout: Layout, streamed: int
    ) -> float:
        """What a step takes the slowest of them, which reads so many bytes of its weights."""
        assert self.link is not None, "nothing is predicted of the CPU"
        on_each = functools.partial(predict, precision=self.precision, streamed=streamed)
        return max(
            on_each(sizes, workload, layout, device, self.link).ms
            for device in devices_of(self.taken(layout), self.speeds)
        )

    def choice(self, layout: Layout, *reasons: str) -> Choice:
        """The layout, with what there is to say."""
        said = " ".join(filter(None, (*reasons, _of_unlike(self.gpus, layout.num_gpus))))
        return Choice(layout, tuple(gpu.number for gpu in self.taken(layout)), said or None)


@dataclass(frozen=True)
class _Outlook:
    """What is known of a model's layouts on a machine.

    ``plain``: the one that needs no reason. ``rooms``: of all layouts, none on the CPU.
    ``measured``: ms of a step of ``workload``.
    """

    info: CheckpointInfo
    machine: _Machine
    plain: Layout
    rooms: Mapping[Layout, Room]
    workload: Workload
    measured: Mapping[Layout, float]

    def estimates(
        self, layouts: Iterable[Layout], *, streams: bool = True
    ) -> dict[Layout, Estimate]:
        """Of those that could be of use. Without ``streams``: as if all weights fitted."""
        predicted = functools.partial(self._predicted_ms, self.workload, streams=streams)
        known = None if self.machine.link is None else predicted
        return estimate(self._useful(layouts, self.workload), self.measured, known)

    def predicted_to_be_best(self, layouts: Iterable[Layout], workload: Workload) -> Layout | None:
        """The fastest by predictions alone."""
        useful = self._useful(layouts, workload)
        return min(useful, key=lambda one: self._predicted_ms(workload, one), default=None)

    def _useful(self, layouts: Iterable[Layout], workload: Workload) -> list[Layout]:
        most = workload.batch
        return [one for one in layouts if one == self.plain or one.batch_groups <= most]

    def _predicted_ms(self, workload: Workload, layout: Layout, streams: bool = True) -> float:
        room = self.rooms.get(layout)
        streamed = room.streamed if streams and room is not None else None
        return self.machine.predicted_ms(self.info.sizes, workload, layout, streamed or 0)


def choose_layout(
    info: CheckpointInfo,
    layouts: Sequence[Layout],
    gpus: Sequence[int],
    records: StepRecords,
    links: LinkRecords,
    precision: Precision = "exact",
    weight_itemsize: int | None = None,
) -> Choice:
    """The fastest of ``layouts`` for what the model is used for; the first is the default.

    Before its first use, for what it is made for. ``gpus``: those that may be used, empty on the
    CPU, where nothing is predicted. Where they are not connected by NVLink, what is predicted to be
    the fastest for what the model is made for takes the default's place. Of GPUs that are not
    alike, a layout takes the fastest, or the largest of those as fast. ``precision``: what links
    carry. ``weight_itemsize``: bytes of a number of the weights; None: as ranks hold the file if
    they are not told. Only times with the same two count.

    A layout that streams weights must be faster by more than ``MIN_GAIN`` than the best that does
    not. Its GPUs are full of weights: where another layout fits, it is left out if what a step on
    the largest usual latents needs has no room beside them. But not if it was measured, or if the
    other one fits on slower GPUs only, and is much slower.
    """
    first, native, speeds = layouts[0], native_workload(info), links.speeds()
    link = link_between(gpus, links) if gpus else None
    itemsize = info.held_itemsize(weight_itemsize)
    machine = _Machine(best_first(gpus_of(gpus), speeds), speeds, link, precision, itemsize)
    usual = records.usual_workload(info.path, *dict.fromkeys(map(machine.times_name, layouts)))
    if len(layouts) == 1 or not (usual or gpus):
        return machine.choice(first)
    workload = usual or native
    rooms: dict[Layout, Room] = {}
    if gpus:  # on which nothing else is
        weight_bytes = info.weight_bytes(itemsize)
        rooms = {
            one: Room.on(machine.taken(one), info.sizes, weight_bytes, one, native)
            for one in layouts
        }
        possible, tight = _possible(info, rooms, workload)
    else:  # where ranks share the cores, nothing is to be had by sharing tokens
        possible, tight = [one for one in layouts if one == first or one.sequence_size == 1], []
    possible = possible or [first]
    plain = first
    if plain not in possible:  # its share is too much for a GPU that is smaller than the others
        plain = max(possible, key=lambda one: (-one.batch_groups, -one.sequence_size, one.tp_size))
    measured = _measured(records, info, machine, layouts, workload)
    outlook = _Outlook(info, machine, plain, rooms, workload, measured)
    fitting = [one for one in possible if one in rooms and rooms[one].fits]
    possible += _worth_trying(outlook, fitting, tight)
    layout = plain
    if link is not None and not (link.fused and plain in fitting):
        best = outlook.predicted_to_be_best
        layout = best(fitting, native) or best(possible, native) or plain
    for among in (fitting, possible):
        times = outlook.estimates(among)
        layout = fastest(layout, times)
    of_streaming = _of_streaming(layout, rooms, outlook.estimates(layouts, streams=False))
    if layout == first and not of_streaming:
        return machine.choice(layout)
    if layout in tight:
        of_streaming += (
            " Larger latents may find no room beside them: then set TP_RUNTIME_GPU_MEMORY, or take "
            "more GPUs by gpu_count."
        )
    latents = f"{workload.latent_shape} {'as of late' if usual else 'as usual for the model'}"
    return machine.choice(layout, _why(layout, outlook, times, latents) + of_streaming, _ADVICE)


def _measured(
    records: StepRecords,
    info: CheckpointInfo,
    machine: _Machine,
    layouts: Iterable[Layout],
    workload: Workload,
) -> dict[Layout, float]:
    """The times of each layout on the GPUs that it would take now."""
    return {
        layout: ms
        for name in dict.fromkeys(map(machine.times_name, layouts))
        for layout, ms in records.times(info.path, name, workload).items()
        if machine.times_name(layout) == name
    }


def _worth_trying(
    outlook: _Outlook, fitting: Sequence[Layout], tight: Sequence[Layout]
) -> list[Layout]:
    """Of the layouts that may have too little room beside their weights, those to be taken along:
    what was measured, and what leaves slow GPUs out and is much faster.
    """
    if not tight:
        return []
    times = outlook.estimates([*fitting, *tight])
    best = min((one for one in fitting if one in times), key=lambda one: times[one].ms)
    taken = outlook.machine.taken

    def leaves_out_slow_ones(layout: Layout) -> bool:
        with_others = taken(best)[layout.num_gpus :]
        return (
            bool(with_others)
            and not are_alike((taken(layout)[-1], with_others[-1]))
            and MUCH_FASTER * times[layout].ms < times[best].ms
        )

    known = [one for one in tight if one in times]
    return [one for one in known if times[one].measured or leaves_out_slow_ones(one)]


def _why(layout: Layout, outlook: _Outlook, times: Mapping[Layout, Estimate], latents: str) -> str:
    """Why a layout is taken, for a person; ``times``: of those that were possible."""
    plain, link = outlook.plain, outlook.machine.link
    of_three = "sequence size x " if layout.sequence_size > 1 else ""
    others = f", and {plain} takes {times[plain]}" if layout != plain else ""
    why = f" The GPUs' link is {link.name} ({link.source})." if link is not None else ""
    return (
        f"'auto' takes the layout {layout} (TP size x {of_three}batch groups): {times[layout]} a "
        f"step{others}, for latents of {latents}.{why}"
    )


def nothing_measured() -> tuple[StepRecords, LinkRecords]:
    """Books that stay empty: what is chosen by them follows from the model and the GPUs alone."""
    nowhere = Path(os.devnull)
    return StepRecords(nowhere), LinkRecords(nowhere)


def _possible(
    info: CheckpointInfo, rooms: Mapping[Layout, Room], workload: Workload
) -> tuple[list[Layout], list[Layout]]:
    """The layouts whose weights fit, and those that can stream them.

    If any fits, those of the latter that have no room for what else a step needs come apart.
    """
    family = info.family
    largest = info.sizes.geometry.latent_shape(*family.extents[-1])
    usual = Workload((workload.batch, *largest), family.text_tokens)
    some_fit = any(room.fits for room in rooms.values())

    def has_room(layout: Layout, room: Room) -> bool:
        needed = max(live_bytes(info.sizes, one, layout) for one in (workload, usual))
        return needed <= room.beside

    usable = [layout for layout, room in rooms.items() if room.fits or room.can_stream]
    tight = [
        layout
        for layout in usable
        if some_fit and not rooms[layout].fits and not has_room(layout, rooms[layout])
    ]
    return [layout for layout in usable if layout not in tight], tight


def _of_streaming(
    layout: Layout, rooms: Mapping[Layout, Room], unstreamed: Mapping[Layout, Estimate]
) -> str:
    """What of the weights is in the host's memory, and which layout was not taken for that.

    ``unstreamed``: the times of all layouts, if all of their weights were on the GPUs.
    """
    if layout not in unstreamed or layout not in rooms:
        return ""

    taken, best = rooms[layout], min(unstreamed, key=lambda one: unstreamed[one].ms)
    said, other = "", rooms[best]
    if taken.streamed:
        said = (
            f" Each GPU reads {taken.streamed / _GIB:.1f} GiB of its weights from the host's "
            "memory at every step."
        )
    is_faster = unstreamed[best].ms < (1 - MIN_GAIN) * unstreamed[layout].ms
    if is_faster and not unstreamed[best].measured and not other.fits:
        said += (
            f" {best} would be faster if its weights fitted: of {other.share / _GIB:.1f} GiB, a "
            f"GPU holds {other.limit / _GIB:.1f}, and would have to read the rest from the host's "
            "memory."
        )
    return said


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
    return native_workload_of(info.family, info.sizes)


def native_workload_of(family: Family, sizes: Sizes) -> Workload:
    """The same of a model without a file."""
    shape = sizes.geometry.latent_shape(*family.extents[0])
    return Workload((1, *shape), family.text_tokens)


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
    of_each = [usual_link(gpu.kind, peers=peers) for gpu in gpus_of(gpus)]
    return min(of_each, key=lambda link: link.rate)
