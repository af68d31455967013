"""Which layers of a rank's shard stay in the host's memory, if its device cannot hold them all."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import SizeError
from .table import ITEM, PROMPT, Linear, Table

# The ring that streamed layers pass through on the device, in largest layers: one that is
# multiplied, one that is there already, one on its way.
RING_LAYERS = 3
_GIB = 2**30


@dataclass(frozen=True)
class LayerSize:
    """A layer of a block that could be streamed. ``over``: what passes through it (``table``)."""

    path: str
    over: str
    nbytes: int


@dataclass(frozen=True)
class StreamingPlan:
    """``paths`` of the layers that are streamed, and the bytes of the ring on the device."""

    paths: tuple[str, ...]
    ring_bytes: int


def layers_of(table: Table, tp_size: int, itemsize: float) -> list[LayerSize]:
    """The layers of the blocks, as each of so many ranks has them, with so many bytes a number."""
    found = []
    for stack in table.stacks:
        linears = [row for row in stack.rows if isinstance(row, Linear)]
        sizes = [round(itemsize * math.prod(row.costs(0).local(tp_size))) for row in linears]
        found += [
            LayerSize(f"{stack.ours}.{index}.{row.ours}", row.over, size)
            for index in range(stack.count)
            for row, size in zip(linears, sizes, strict=True)
        ]
    return found


def streaming_plan(
    label: str, layers: Sequence[LayerSize], total_bytes: int, limit: int | None
) -> StreamingPlan | None:
    """What to stream so that a shard of ``total_bytes`` takes ``limit`` bytes on the device.

    None: all of it fits. ``layers``: in the order in which they are used, more or less. First go
    those that only a prompt passes through, last those that one row of each item does: between the
    latter's products, nothing is computed while the next is read. Layers of one kind are taken at
    even distances, so that reading goes on all the time.

    Raises:
        SizeError: what cannot be streamed does not fit.
    """
    if limit is None or total_bytes <= limit:
        return None
    ring_bytes = RING_LAYERS * max((layer.nbytes for layer in layers), default=0)
    missing = total_bytes + ring_bytes - limit
    least = total_bytes + ring_bytes - sum(layer.nbytes for layer in layers)
    if least > limit:
        raise SizeError(
            f"{label} needs at least {least / _GIB:.2f} GiB of each GPU for its weights, with all "
            f"of its blocks in the host's memory; {limit / _GIB:.2f} GiB may be used. Choose more "
            "GPUs or a quantised file; or raise TP_RUNTIME_GPU_MEMORY, if it is set."
        )
    chosen: list[LayerSize] = []
    for kind in range(3):
        of_kind = [layer for layer in layers if _preference(layer) == kind]
        still = missing - sum(layer.nbytes for layer in chosen)
        chosen += _spread(of_kind, min(still, sum(layer.nbytes for layer in of_kind)))
    largest = max(layer.nbytes for layer in chosen)
    return StreamingPlan(tuple(layer.path for layer in chosen), RING_LAYERS * largest)


def _preference(layer: LayerSize) -> int:
    return {PROMPT: 0, ITEM: 2}.get(layer.over, 1)


def _spread(layers: Iterable[LayerSize], needed: int) -> list[LayerSize]:
    """Layers of at least ``needed`` bytes together, which is at most all, at even distances."""
    layers = list(layers)
    total = sum(layer.nbytes for layer in layers)
    chosen, seen, taken = [], 0, 0
    for layer in layers:
        seen += layer.nbytes
        if taken * total < needed * seen:
            chosen.append(layer)
            taken += layer.nbytes
    return chosen
