"""A request that one rank of a group refuses is refused by all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.distributed import parallel_state

from ..errors import REFUSALS, TPRuntimeError
from ..gpu.words import said_by_all


@contextmanager
def refused_together() -> Iterator[None]:
    """What the body refuses on one rank, every rank of the group raises at its end.

    In the body a rank looks at what it was asked for, and waits for no other one. Of several that
    refuse, all raise what the first of them did. Every rank has to come here. An error that is no
    refusal goes on at once, and ends the group.
    """
    own: TPRuntimeError | None = None
    try:
        yield
    except tuple(REFUSALS.values()) as error:
        own = error
    said = None if own is None else (type(own).__name__, str(own))
    refusals = filter(None, said_by_all(parallel_state.get_world_group().cpu_group, said))
    for kind, message in refusals:
        raise REFUSALS[kind](message) from own


def least_of_all(number: int) -> int:
    """The least of what the ranks of the group give. Every rank has to come here."""
    return min(said_by_all(parallel_state.get_world_group().cpu_group, number))


def largest_of_batch_group(number: int) -> int:
    """The largest of what the ranks of a batch group give. All of these have to come here."""
    for group in (parallel_state.get_tp_group(), parallel_state.get_pcp_group()):
        if group.world_size > 1:
            number = max(said_by_all(group.cpu_group, number))
    return number


@contextmanager
def beyond_refusing() -> Iterator[None]:
    """What the body refuses ends the group, as any error does: others may wait for this rank."""
    try:
        yield
    except tuple(REFUSALS.values()) as error:
        raise RuntimeError(str(error)) from error
