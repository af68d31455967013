"""Which layout ``auto`` takes for a model on this machine.

By what the model is used for: steps that were measured here (``step_history``), and predictions
(``cost_model``) for the layouts that were not.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import ROOM_BYTES, ROOM_FACTOR, Layout, device_name
from ..recognise import CheckpointInfo
from .cost_model import LINKS, Link, device_of, predict
from .step_history import StepRecords, Workload

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
    """The layout to take: ``default``, unless another one is faster by more than ``MIN_GAIN``."""
    if default not in estimates:
        return default
    best = min(estimates, key=lambda layout: estimates[layout].ms)
    gains = estimates[best].ms < (1 - MIN_GAIN) * estimates[default].ms
    return best if gains else default


@dataclass(frozen=True)
class Choice:
    """A layout; ``reason`` says in a sentence why it is not the default, if it is not."""

    layout: Layout
    reason: str | None = None


def choose_layout(
    info: CheckpointInfo, layouts: Sequence[Layout], gpus: Sequence[int], records: StepRecords
) -> Choice:
    """The fastest of ``layouts`` for what the model is used for; the first is the default.

    ``gpus``: those that may be used, empty on the CPU, where nothing is predicted.
    """
    default = layouts[0]
    device = device_name(gpus[0] if gpus else None)
    workload = records.usual_workload(info.path, device)
    if workload is None or len(layouts) == 1:
        return Choice(default)
    useful = [
        layout
        for layout in layouts
        if layout == default
        or (layout.batch_groups <= workload.batch and _fits(info, layout, gpus))
    ]
    measured = records.times(info.path, device, workload)
    estimates = estimate(useful, measured, _predictor(info, workload, gpus))
    layout = fastest(default, estimates)
    if layout == default:
        return Choice(default)
    return Choice(
        layout,
        f"'auto' takes the layout {layout} (TP size x batch groups): {estimates[layout]} a step, "
        f"and {default} takes {estimates[default]}, for latents of {workload.latent_shape} as of "
        "late. Set layout or gpu_count to decide yourself.",
    )


def _predictor(
    info: CheckpointInfo, workload: Workload, gpus: Sequence[int]
) -> Callable[[Layout], float] | None:
    if not gpus:
        return None
    device, link = device_of(device_name(gpus[0])), link_between(gpus)

    def milliseconds(layout: Layout) -> float:
        return predict(
            info.sizes,
            workload.latent_shape,
            workload.text_tokens,
            layout.tp_size,
            layout.batch_groups,
            device,
            link,
        ).ms

    return milliseconds


def link_between(gpus: Sequence[int]) -> Link:
    """What is likely to connect these GPUs: torch tells whether they reach each other's memory.

    Those of data centres do it through NVLink.
    """
    import torch

    pairs = itertools.permutations(gpus, 2)
    if not all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs):
        return LINKS["pcie-host"]
    known = device_of(device_name(gpus[0])).name != "other"
    return LINKS["nvlink" if known else "pcie"]


def _fits(info: CheckpointInfo, layout: Layout, gpus: Sequence[int]) -> bool:
    """Whether each GPU could hold its share of the weights, if nothing else were on it."""
    if not gpus:
        return True
    import torch

    plain_fp8 = not info.quantised and any(t.dtype.startswith("F8") for t in info.tensors.values())
    share = info.weight_bytes(itemsize=1 if plain_fp8 else 2) / layout.tp_size
    smallest = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    return share * ROOM_FACTOR + ROOM_BYTES <= smallest
