"""What other workers of a run, which share this machine's cores, mean for a test's bounds."""

import os

# A process of one of them may keep another waiting for so long.
_STALL_S = 10.0
BESIDE_OTHERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1


def bound_s(alone_s: float) -> float:
    """How long something may take that takes at most `alone_s` where each process has a core.

    Beside other workers, ten times that: still less than the timeouts (30 s and more) by which it
    would end if nobody noticed what the test is about.
    """
    return 10 * alone_s if BESIDE_OTHERS else alone_s


def stalled_s(alone_s: float) -> float:
    """The same where `alone_s` has a timeout in it: ten times that would say nothing."""
    return alone_s + _STALL_S if BESIDE_OTHERS else alone_s
