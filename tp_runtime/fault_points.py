"""Faults at named points of a rank, for tests; nothing happens unless a test asks.

A test names a file in ``TP_RUNTIME_TEST_FAULTS`` before the group starts, and later writes a
``Fault`` into it as JSON. The rank that reaches the point takes the file away, so a fault happens
once, leaves the moment (of the machine's monotonic clock, in seconds) in a file beside it that
ends in ``.at``, and does what the fault says.

Points: ``start`` (before the rank joins its group), ``load`` (the file has been checked), ``read``
(the file is open, and no rank has refused it), ``compile`` (conditioning is new), ``evaluate``,
``sleep``, ``unload``, ``idle`` (no request for a second).
"""

import os
import signal
import time
from pathlib import Path
from typing import Literal

import msgspec
import torch

from .errors import CheckpointError

# What torch says on a GPU, with its numbers.
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 139.80 GiB of "
    "which 1.20 GiB is free. Including non-PyTorch memory, this process has 138.60 GiB memory in "
    "use. Of the allocated memory 130.00 GiB is allocated by PyTorch, and 5.00 GiB is reserved by "
    "PyTorch but unallocated."
)


class Fault(msgspec.Struct, frozen=True):
    """What happens to ``rank`` when it reaches ``point`` next; ``delay_s`` is for ``delay``."""

    rank: int
    point: str
    action: Literal["die", "stop", "raise", "refuse", "allocate", "out of memory", "delay"]
    delay_s: float = 0.0


_rank = -1
_file: Path | None = None


def watch(rank: int, path: str) -> None:
    """From now on, faults of this rank are looked for in that file; ``""``: there are none."""
    global _rank, _file
    _rank, _file = rank, Path(path) if path else None


def reach(point: str) -> None:
    """The rank is at ``point``."""
    if _file is None:
        return
    try:
        fault = msgspec.json.decode(_file.read_bytes(), type=Fault)
    except FileNotFoundError:
        return
    if (fault.rank, fault.point) != (_rank, point):
        return
    _file.unlink()
    _file.with_suffix(".at").write_text(str(time.monotonic()))
    match fault.action:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "raise":
            raise RuntimeError(f"a fault at {point!r}, as a test asked")
        case "refuse":
            raise CheckpointError(f"a refusal at {point!r}, as a test asked")
        case "allocate":  # more than any machine has
            device = "cuda" if torch.cuda.is_available() else "cpu"
            torch.empty(2**60, dtype=torch.uint8, device=device)
        case "out of memory":
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        case "delay":
            time.sleep(fault.delay_s)
