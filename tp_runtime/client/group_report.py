"""What a group is and holds, for a person."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import Layout
from ..wire.protocol import Report
from .engine import Engine
from .poll import Poll


@dataclass(frozen=True)
class GroupReport:
    """What a group is and holds. ``ranks``: one mapping each, empty unless it was asked for.

    ``models``: name → ``bytes`` on each rank's device and ``streamed`` ones with its host (None
    while it loads), and ``asleep``. ``step_ms``: how long the last evaluation took, from the
    request to the last rank's answer. ``log_tail``: the end of the log of the rank that failed.
    ``ready_ranks``: how many ranks have started, and ``starting_s``: since when that goes on. A
    rank's mapping:
    ``rank``, ``tp_world_size`` (as vLLM reports it there), ``device``, ``pid``, ``place`` (its
    process and host, in words), ``mirrored`` (its tensors go by TCP), ``versions``,
    ``memory`` (bytes), ``models`` (bytes resident and read, ...), ``evaluations`` (how many it has
    made) and ``evaluation_ms`` (what they took it, from when their inputs were there).
    """

    id: str
    state: str
    tp_size: int
    batch_groups: int
    sequence_size: int
    device: str
    devices: tuple[int, ...]
    python: str
    error: str | None
    models: dict[str, dict[str, Any]]
    step_ms: float | None = None
    log_tail: str = ""
    ready_ranks: int = 0
    starting_s: float = 0.0
    ranks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        """How its ranks share the work."""
        return Layout(self.tp_size, self.batch_groups, self.sequence_size)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


def rank_reports(engine: Engine, digests: bool, poll: Poll | None) -> list[dict[str, Any]]:
    """What is known of each rank and what it says itself; raises as ``Engine.call``.

    ``digests``: with a hash of the weights of every model.
    """
    said = engine.call(lambda call: Report(call, digests), poll=poll)
    return [
        {
            "rank": ready.rank,
            "tp_world_size": ready.tp_world_size,
            "pid": rank.pid,
            "place": rank.place,
            "mirrored": rank.mirrored,
            "versions": ready.versions,
            **value,
        }
        for ready, rank, value in zip(engine.processes.ready, engine.ranks, said, strict=True)
    ]
