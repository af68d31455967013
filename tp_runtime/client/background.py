"""Threads for what nobody waits for, until Python ends: then it waits for them, for a while.

A daemon thread that frees a tensor while the interpreter is taken down aborts the process: torch's
destructor takes the interpreter's lock, Python ends the thread there, and no destructor of C++ may
be left so ("terminate called without an active exception", torch 2.13, Python 3.11).
"""

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

AT_EXIT_S = 5.0

_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def in_background(call: Callable[..., Any], *args: Any) -> None:
    """Call it in a thread. Raises RuntimeError if the system has none left."""
    thread = threading.Thread(target=call, args=args, name="tp-runtime-background", daemon=True)
    thread.start()
    _threads.add(thread)


# What ends the groups is registered later, and so called before.
@atexit.register
def _let_them_end() -> None:
    deadline = time.monotonic() + AT_EXIT_S
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
