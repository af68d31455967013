"""How long evaluations take: whether they are short, and when a rank has been silent for too long.

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
SHORT_S = 0.5  # after a cancel, the ranks may be busy with two that are no longer


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

    def is_known(self, kind: Hashable) -> bool:
        """Whether the next one should take about as long as the last. The first ones may not."""
        return kind in self._last_s

    def is_short(self, kind: Hashable) -> bool:
        """Whether the next one should be over soon."""
        return self._last_s.get(kind, SHORT_S) < SHORT_S

    def timeout_s(self, kind: Hashable, limit_s: float) -> float:
        """How long the next one may take; at most ``limit_s``."""
        slowest_s = self._slowest_s.get(kind)
        if slowest_s is None:
            return limit_s
        return min(limit_s, max(FLOOR_S, FACTOR * slowest_s))
