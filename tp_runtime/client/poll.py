"""How a caller waits: it is asked every few milliseconds whether it still wants to."""

import contextlib
import threading
from collections.abc import Callable, Iterator

POLL_S = 0.01

# Called every ``POLL_S`` or so by what waits; what it raises (a cancel) ends the wait.
Poll = Callable[[], None]


@contextlib.contextmanager
def acquired(lock: threading.Lock, poll: Poll | None) -> Iterator[None]:
    """Hold the lock in the body; ``poll`` is called while this thread waits for it."""
    while not lock.acquire(timeout=POLL_S):
        if poll is not None:
            poll()
    try:
        yield
    finally:
        lock.release()
