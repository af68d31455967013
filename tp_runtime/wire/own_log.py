"""The log of a process that ComfyUI's process started: its standard output."""

import contextlib
import os

MAX_LOG_BYTES = 8 * 2**20
KEPT_LOG_BYTES = 2**20


def shorten_own_log() -> None:
    """Keep only the end of this process's log if it has grown too long, whoever writes to it.

    It is a file that was opened for appending. Where the system refuses it (open files, a full
    disk), the log stays too long until the next call: nobody's work ends of that.
    """
    with contextlib.suppress(OSError):
        size = os.fstat(1).st_size
        if size > MAX_LOG_BYTES:
            with open("/proc/self/fd/1", "r+b") as log:
                log.seek(size - KEPT_LOG_BYTES)
                end = log.read()
                log.seek(0)
                log.write(b"(what came before was too long)\n" + end)
                log.truncate()
