"""What the ranks of a group tell one another on the CPU."""

from typing import Any

import torch.distributed as dist


def said_by_all(group: dist.ProcessGroup, mine: Any) -> list[Any]:
    """What each rank says, in their order. ``mine``: what this one does. All must ask.

    ``group``: one on the CPU.
    """
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found
