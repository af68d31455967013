"""Frames between the engine and one rank, over a private socket pair. Both halves use it.

The rank inherits its end as a file descriptor: there is no address that a stranger could connect
to, and the death of either side is seen by the other at once as the end of the stream.
"""

import socket
from collections.abc import Iterable
from multiprocessing import connection
from typing import Any

from .errors import ProtocolError
from .protocol import MAX_FRAME_BYTES


def wait(sources: Iterable[Any], timeout_s: float | None) -> list[Any]:
    """The channels and file descriptors among ``sources`` that are ready, after a while."""
    return connection.wait(sources, timeout_s)


class Channel:
    """One end of a stream of frames. ``EOFError`` means that the other side is gone."""

    def __init__(self, fd: int) -> None:
        self._connection = connection.Connection(fd)

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """This process's end, and the other as a socket to hand to a rank and then close."""
        ours, theirs = socket.socketpair()
        return cls(ours.detach()), theirs

    def fileno(self) -> int:
        """The file descriptor, so that ``wait`` takes a channel."""
        return self._connection.fileno()

    def send(self, frame: bytes) -> None:
        """Raises EOFError if the other side is gone."""
        try:
            self._connection.send_bytes(frame)
        except OSError as error:
            raise EOFError(f"the other side is gone ({error})") from error

    def receive(self) -> bytes:
        """The next frame; blocks until there is one.

        Raises:
            EOFError: the other side is gone.
            ProtocolError: the frame is longer than a frame may be.
        """
        try:
            return self._connection.recv_bytes(MAX_FRAME_BYTES)
        except ConnectionError as error:
            raise EOFError(f"the other side is gone ({error})") from error
        except OSError as error:
            if str(error) == "bad message length":
                raise ProtocolError(f"A frame of over {MAX_FRAME_BYTES} bytes.") from error
            raise EOFError(f"the stream is broken ({error})") from error

    def close(self) -> None:
        """Idempotent."""
        if not self._connection.closed:
            self._connection.close()
