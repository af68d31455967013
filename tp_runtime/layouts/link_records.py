"""How fast the GPUs of this machine send data to one another, and compute; measured once and kept.

One small JSON file in ``home()``: by machine and set of GPUs. ``choice`` predicts by it.
"""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..config import home
from .book import read_book, write_book
from .cost_model import NCCL_S, START, TILE, Device, Link

FILE = "link_records.json"  # ``doctor`` reads it, too, and what it reads of an entry
_Rate = Annotated[float, msgspec.Meta(gt=0, lt=1e15)]
_Flops = Annotated[float, msgspec.Meta(gt=0, lt=1e18)]


class LinkRates(msgspec.Struct, frozen=True):
    """What was measured: rates and a hop, as of a ``Link``.

    ``host_rate``: None in records from before it was measured.
    """

    rate: _Rate
    exchange_rate: _Rate
    hop_s: Annotated[float, msgspec.Meta(ge=0, lt=60)]
    host_rate: _Rate | None = None

    @classmethod
    def of_ranks(cls, said: Sequence[Mapping[str, Any]]) -> "LinkRates":
        """From the ranks' answers to ``MeasureLink``; the slowest counts.

        Of a small and a large tensor, so that what both cost is known apart from the bytes.
        """
        num_ranks = len(said)
        small, large = said[0]["sizes"]
        (small_sum_s, large_sum_s), exchanges_s = (
            [max(of_size) for of_size in zip(*(one[what] for one in said), strict=True)]
            for what in ("sums_s", "exchanges_s")
        )
        # NCCL's ring: 2 (T-1)/T of the bytes in 2 (T-1) hops; see ``cost_model``.
        share = (num_ranks - 1) / num_ranks
        rate = 2 * share * (large - small) / _longer(small_sum_s, large_sum_s)
        hops_s = max(small_sum_s - NCCL_S - 2 * share * small / rate, 0.0)
        exchange_rate = share * (large - small) / _longer(*exchanges_s)
        hop_s = hops_s / (2 * (num_ranks - 1))
        read = [one["host"]["bytes"] / one["host"]["copy_s"] for one in said if "host" in one]
        return cls(rate, exchange_rate, hop_s, min(read, default=None))

    def on(self, link: Link) -> Link:
        """The link that it was taken for, with what was measured.

        Fused sums do not go through NCCL, whose sums were measured.
        """
        measured = replace(
            link,
            exchange_rate=self.exchange_rate,
            exchange_total=None,  # all of the group exchanged
            host_rate=self.host_rate,
        )
        if link.fused:
            source = f"{link.source}; exchanges measured on this machine"
            return replace(measured, source=source)
        source = f"measured on this machine: {self}"
        return replace(measured, rate=self.rate, hop_s=self.hop_s, source=source)

    def __str__(self) -> str:
        rates = self.rate / 1e9, self.exchange_rate / 1e9
        said = "{:.1f} GB/s in sums, {:.1f} in exchanges".format(*rates)
        read = "" if self.host_rate is None else f", {self.host_rate / 1e9:.1f} from the host"
        return f"{said}{read}"


def _longer(small_s: float, large_s: float) -> float:
    """Seconds that the large tensor took longer; never none, whatever the clock says."""
    return max(large_s - small_s, large_s / 100)


# Of what a plain sum of two tensors reaches, what the element-wise passes of a step do.
PASSES = 0.7


class Speed(msgspec.Struct, frozen=True):
    """How fast a GPU computes: rates and multiprocessors, as of a ``Device``."""

    matmul: _Flops
    attention: _Flops
    memory: _Rate
    multiprocessors: Annotated[int, msgspec.Meta(gt=0, lt=10_000)]

    @classmethod
    def of_rank(cls, said: Mapping[str, Any]) -> "Speed":
        """From the times of a rank's answer to ``MeasureLink``: what explains them."""
        side, at_once = said["side"], said["multiprocessors"]
        tiles = math.ceil(side / TILE) ** 2
        product = 2 * TILE**2 * (side * tiles + START * max(tiles, at_once))
        tiles = math.ceil(side / TILE) * said["heads"]
        attention = 4 * TILE * side * said["head_dim"] * max(tiles, at_once)
        memory = PASSES * 3 * said["added_bytes"] / said["sum_s"]
        return cls(product / said["product_s"], attention / said["attention_s"], memory, at_once)

    def on(self, kind: Device) -> Device:
        """The kind, with what was measured."""
        measured = {name: getattr(self, name) for name in self.__struct_fields__}
        return replace(kind, **measured, source="measured on this machine")


class _OfGpus(msgspec.Struct):
    """``rates`` None: the measurement was begun and has not ended. ``speeds``: by product name."""

    machine: str
    gpus: tuple[str, ...]
    rates: LinkRates | None = None
    speeds: dict[str, Speed] = {}


class LinkRecords:
    """The book of links. GPUs are told by number and name (``gpu_names``)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun: set[str] = set()  # by this process: also where nothing can be written

    @classmethod
    def of_home(cls) -> "LinkRecords":
        """Those of this machine."""
        return cls(home() / FILE)

    def is_known(self, gpus: Iterable[str]) -> bool:
        """Whether these were measured, or it was begun and ended the process or its group.

        That is not tried again: it would end every group of these GPUs.
        """
        key = _key(gpus)
        return key in self._begun or key in self._read()

    def between(self, gpus: Iterable[str]) -> LinkRates | None:
        """Of these GPUs, or else of the most of them that were measured together."""
        wanted, here = set(gpus), platform.node()
        found = [
            entry
            for entry in self._read().values()
            if entry.machine == here and wanted.issuperset(entry.gpus) and entry.rates
        ]
        return max(found, key=lambda entry: len(entry.gpus)).rates if found else None

    def speeds(self) -> dict[str, Speed]:
        """Of the GPUs of this machine that were measured, by product name."""
        here = platform.node()
        found = [entry.speeds for entry in self._read().values() if entry.machine == here]
        return {name: speed for speeds in found for name, speed in speeds.items()}

    def begin(self, gpus: Iterable[str]) -> None:
        """These are about to be measured."""
        gpus = tuple(gpus)
        self._begun.add(_key(gpus))
        self._write(gpus, None)

    def add(self, gpus: Iterable[str], rates: LinkRates, speeds: Sequence[Speed] = ()) -> None:
        """These were measured; ``speeds``: of each. Of GPUs with one name, the slowest counts."""
        gpus = list(gpus)
        by_name: dict[str, Speed] = {}
        for gpu, speed in zip(gpus, speeds, strict=False):
            name = gpu.partition(" ")[2]
            by_name[name] = min(by_name.get(name, speed), speed, key=lambda one: one.matmul)
        self._write(gpus, rates, by_name)

    def forget(self, gpus: Iterable[str]) -> None:
        """These are to be measured the next time."""
        key, book = _key(gpus), self._read()
        self._begun.discard(key)
        book.pop(key, None)
        write_book(self._path, book)

    def _write(
        self,
        gpus: Iterable[str],
        rates: LinkRates | None,
        speeds: Mapping[str, Speed] | None = None,
    ) -> None:
        gpus = tuple(gpus)
        entry = _OfGpus(platform.node(), gpus, rates, dict(speeds or {}))
        write_book(self._path, self._read() | {_key(gpus): entry})

    def _read(self) -> dict[str, _OfGpus]:
        return read_book(self._path, _OfGpus)


def _key(gpus: Iterable[str]) -> str:
    return f"{', '.join(sorted(gpus))} of {platform.node()}"
