"""What the TP Runtime Info node of a prompt said of the process groups."""

import json
from typing import Any

from support.comfy_history import History


def groups(history: History, node_id: str = "report") -> list[dict[str, Any]]:
    """The groups that there were when the node ran, with what every rank said."""
    found: list[dict[str, Any]] = json.loads(history.text(node_id))["groups"]
    return found


def group(history: History, tp_size: int = 2) -> dict[str, Any]:
    """The one group of that size."""
    (found,) = [group for group in groups(history) if group["tp_size"] == tp_size]
    return found


def rank_pids(history: History, tp_size: int = 2) -> list[int]:
    """Process ids of the group of that size, in the order of its ranks.

    Raises:
        AssertionError: the group is not up, or a rank sees another tensor-parallel size.
    """
    found = group(history, tp_size)
    assert [rank["tp_world_size"] for rank in found["ranks"]] == [tp_size] * tp_size, found
    return [rank["pid"] for rank in found["ranks"]]
