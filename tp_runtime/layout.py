"""How the GPUs of a group share the work, and which way is the fastest. Part of the engine's half.

A layout is *TP size x batch groups*: ``4x1`` is plain tensor parallelism on four GPUs, ``2x2`` two
batch groups of two, each with the whole model, that divide a forward batch (the two halves of a CFG
step, several latents) between them.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

MIN_GAIN = 0.05  # a layout other than the default must be so much faster


@dataclass(frozen=True, order=True)
class Layout:
    """``tp_size`` GPUs for each of ``batch_groups`` copies of the model."""

    tp_size: int
    batch_groups: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tp_size * self.batch_groups

    def __str__(self) -> str:
        return f"{self.tp_size}x{self.batch_groups}"

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """The layout that ``str`` gave. Raises ValueError."""
        tp_size, separator, batch_groups = text.partition("x")
        if not (separator and tp_size.isdecimal() and batch_groups.isdecimal()):
            raise ValueError(f"layout={text!r}: write TP size x batch groups, such as 2x2.")
        return cls(int(tp_size), int(batch_groups))


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
