"""Waiting for what another thread or process does."""

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], bool], within_s: float = 30.0, otherwise: str = "it did not come"
) -> None:
    """Returns as soon as the condition holds.

    Raises:
        AssertionError: it does not within `within_s`; `otherwise` is the message.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.005)
