"""What the steps of samplers took on this machine, kept between starts.

One small JSON file in ``home()``: by model file and device, for each shape of latents and each
layout, the latest times. ``layout`` decides by them.
"""

import platform
import time
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from ..config import Layout, Precision, gpu_memory
from .book import read_book, write_book

KEPT_TIMES = 16  # the latest ones, of which the shortest counts: first steps compile and record
KEPT_SHAPES = 32  # of each model, and
KEPT_MODELS = 100  # of all machines and devices: those that were used last
MIN_TIMES = 4
SAVE_INTERVAL_S = 5.0
# A new layout means a new group and another load: what asks for it must have come for a while.
USUAL_STEPS = 40


# What is read from the file is held to these.
_Length = Annotated[int, msgspec.Meta(gt=0, lt=2**31)]
_Milliseconds = Annotated[float, msgspec.Meta(gt=0)]


class Workload(msgspec.Struct, frozen=True):
    """What one step of a sampler evaluates.

    ``latent_shape`` (B, C, ..., H, W), with the items of all conditions together as B;
    ``text_tokens``: of the longest text.
    """

    latent_shape: Annotated[tuple[_Length, ...], msgspec.Meta(min_length=4)]
    text_tokens: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]

    @property
    def batch(self) -> int:
        return self.latent_shape[0]


def times_of(device: str, precision: Precision, itemsize: int = 2) -> str:
    """The name by which times of a device are kept: sums in 8 bits have others, and so have weights
    of one byte (``itemsize``, of those that are not quantised), or where less of them may lie on a
    GPU.
    """
    held = "weights in 8 bits" if itemsize == 1 else ""
    limit = gpu_memory()
    limited = f"{limit / 2**30:g} GiB of them a GPU" if limit else ""
    name = device if precision == "exact" else f"{device}, {precision}"
    return ", ".join(filter(None, (name, held, limited)))


class _OfModel(msgspec.Struct):
    """``times``: shape of the latents as text → layout as text → the latest times in ms.

    ``other_steps``: how often the workload ``other`` has come since ``usual`` came last.
    """

    usual: Workload
    other: Workload | None = None
    other_steps: int = 0
    times: dict[str, dict[str, list[_Milliseconds]]] = {}

    def count(self, workload: Workload) -> None:
        """A step had this workload."""
        if workload == self.usual:
            self.other = None
        elif workload != self.other:
            self.other, self.other_steps = workload, 1
        else:
            self.other_steps += 1
            if self.other_steps >= USUAL_STEPS:
                self.usual, self.other = workload, None


T = TypeVar("T")
_Book = dict[str, _OfModel]


class StepRecords:
    """The book of times. Another process's entries of the same model may replace this one's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._saved_at = 0.0
        self._mine: _Book = {}

    def add(self, model: str, device: str, workload: Workload, layout: Layout, ms: float) -> None:
        """A step took so long. ``model``: the file's path; ``device``: of ``times_of``."""
        key = _key(model, device)
        entry = self._mine.pop(key, None) or self._read().get(key) or _OfModel(workload)
        self._mine[key] = entry  # at the end: it was used last
        entry.count(workload)
        shape = str(workload.latent_shape)
        by_layout = entry.times.pop(shape, {})
        entry.times = _latest(entry.times | {shape: by_layout}, KEPT_SHAPES)
        times = by_layout.setdefault(str(layout), [])
        times.append(round(ms, 3))
        del times[:-KEPT_TIMES]
        if time.monotonic() - self._saved_at > SAVE_INTERVAL_S:
            self.save()

    def usual_workload(self, model: str, *devices: str) -> Workload | None:
        """What the model is used for: its first use, or what its last ``USUAL_STEPS`` steps were.

        On the one of ``devices`` that it was used on last. A workflow that alternates between two,
        such as samplers with and without CFG, changes nothing.
        """
        wanted = {_key(model, device) for device in devices}
        entries = [entry for key, entry in self._all().items() if key in wanted]
        return entries[-1].usual if entries else None

    def times(self, model: str, device: str, workload: Workload) -> dict[Layout, float]:
        """The time of a step in ms, of every layout that was used often enough to say."""
        entry = self._entry(model, device)
        if entry is None:
            return {}
        by_layout = entry.times.get(str(workload.latent_shape), {})
        return {
            Layout.parse(layout): min(times)
            for layout, times in by_layout.items()
            if len(times) >= MIN_TIMES
        }

    def save(self) -> None:
        """Write what was added."""
        self._saved_at = time.monotonic()
        write_book(self._path, _latest(self._all(), KEPT_MODELS))

    def _entry(self, model: str, device: str) -> _OfModel | None:
        key = _key(model, device)
        return self._mine.get(key) or self._read().get(key)

    def _all(self) -> _Book:
        """The file's entries, and behind them those that this process has used."""
        others = {key: entry for key, entry in self._read().items() if key not in self._mine}
        return others | self._mine

    def _read(self) -> _Book:
        book = read_book(self._path, _OfModel)
        for entry in book.values():
            for by_layout in entry.times.values():
                # Another release may have written others.
                for layout in [text for text in by_layout if not _is_layout(text)]:
                    del by_layout[layout]
        return book


def _is_layout(text: str) -> bool:
    try:
        Layout.parse(text)
    except ValueError:
        return False
    return True


def _latest(entries: dict[str, T], number: int) -> dict[str, T]:
    """The last ones that were put in."""
    return dict(list(entries.items())[-number:])


def _key(model: str, device: str) -> str:
    return f"{model} on {device}, {platform.node()}"
