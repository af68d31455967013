"""How long evaluations take: when the next is due, and when a rank has been silent for too long.

Evaluations are alike if the model and the shapes of all inputs are. The first ones of a kind
compile and record, so they get the time of every other request (``TP_RUNTIME_CALL_TIMEOUT``), and
no evaluation ever gets more; later ones get many times what the slowest took.
"""

from collections.abc import Hashable, Mapping
from typing import Any

import torch

FIRST_EVALUATIONS = 2  # one compiles, one records
FACTOR = 20.0
FLOOR_S = 60.0  # conditioning that is new, patched weights and a busy machine take longer
# How much sooner or later than the last one the next may end, and still be expected.
EXPECTED_FACTOR = 0.05
EXPECTED_S, MAX_EXPECTED_S = 0.001, 0.01


def shapes_of(value: Any) -> Hashable:
    """The shapes of the tensors in a tree of plain data."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((key, shapes_of(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(shapes_of, value))
    return None


class EvaluationTimes:
    """What evaluations took, by their kind."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, int] = {}
        self._slowest_s: dict[Hashable, float] = {}
        self._last_s: dict[Hashable, float] = {}

    def record(self, kind: Hashable, seconds: float) -> None:
        """An evaluation of this kind took so long."""
        self._seen[kind] = self._seen.get(kind, 0) + 1
        if self._seen[kind] > FIRST_EVALUATIONS:
            self._slowest_s[kind] = max(seconds, self._slowest_s.get(kind, 0.0))
            self._last_s[kind] = seconds

    def due_s(self, kind: Hashable) -> tuple[float, float] | None:
        """From when to when after its beginning the next one should end; None: not known."""
        last_s = self._last_s.get(kind)
        if last_s is None:
            return None
        margin_s = min(EXPECTED_S + EXPECTED_FACTOR * last_s, MAX_EXPECTED_S)
        return last_s - margin_s, last_s + margin_s

    def timeout_s(self, kind: Hashable, limit_s: float) -> float:
        """How long the next one may take; at most ``limit_s``."""
        slowest_s = self._slowest_s.get(kind)
        if slowest_s is None:
            return limit_s
        return min(limit_s, max(FLOOR_S, FACTOR * slowest_s))
