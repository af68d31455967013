"""Frames between the engine and one rank, over a stream of bytes.

On one machine the stream is a private socket pair. The rank inherits its end as a file descriptor:
there is no address that a stranger could connect to, and the death of either side is seen by the
other at once as the end of the stream. Over a network (``handshake``) it is a TCP connection. A
frame is preceded by its length, four bytes, the highest first.
"""

import array
import contextlib
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Iterable
from multiprocessing import connection
from typing import Any

from .. import reasons
from ..errors import ProtocolError, TPRuntimeError
from .protocol import MAX_FRAME_BYTES

_LENGTH = struct.Struct(">I")
_CHUNK_BYTES = 64 * 2**10  # more than that, and each look for frames maps fresh memory
MAX_PACKET_BYTES = 128 * 2**10

# Over a network, the other side may go without a word: it is gone when it has not acknowledged
# anything for so long, whether there was something to send or not.
SILENCE_S = 6
_UNHEARD = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)
# Of Linux's struct tcp_info: questions to the other host that it has not answered, packets on their
# way to it, and ms since its last acknowledgement.
_TCP_INFO = struct.Struct("=3xB20xI28xI")


def wait(sources: Iterable[Any], timeout_s: float | None) -> list[Any]:
    """The channels and file descriptors among ``sources`` that are ready, after a while."""
    return connection.wait(sources, timeout_s)


class Readiness:
    """Which of a fixed set of channels and file descriptors are ready; for whoever asks often.

    Any thread may ask. What is closed is not asked about any more. Call ``close`` in the end.
    """

    def __init__(self, sources: Iterable["Channel | int"]) -> None:
        """Raises TPRuntimeError if this process may open no more files."""
        try:
            self._epoll = select.epoll()
        except OSError as error:
            raise TPRuntimeError(
                f"A process group cannot be watched: {reasons.of(error)}"
            ) from error
        self._sources = {
            source if isinstance(source, int) else source.fileno(): source for source in sources
        }
        for fd in self._sources:
            self._epoll.register(fd, select.EPOLLIN)

    def wait(self, timeout_s: float) -> list["Channel | int"]:
        """Those that are ready, after a while; also channels whose other side is gone."""
        try:
            return [self._sources[fd] for fd, _ in self._epoll.poll(timeout_s)]
        except ValueError:  # closed
            return []

    def close(self) -> None:
        """Idempotent. From then on nothing is ready."""
        self._epoll.close()


def receive_with_fds(stream: socket.socket, max_fds: int) -> tuple[bytes, list[int]]:
    """One packet and its file descriptors, which no program that this process starts inherits.

    Raises OSError: this process may not have so many.

    Not ``socket.recv_fds``, which ignores its flags (CPython 3.11).
    """
    fds = array.array("i")
    room = socket.CMSG_SPACE(max_fds * fds.itemsize)
    packet, ancillary, flags, _ = stream.recvmsg(MAX_PACKET_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if flags & socket.MSG_CTRUNC:  # the kernel gives as many as may be open, and no error
        for fd in fds:
            os.close(fd)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return packet, list(fds)


def bound_silence(stream: socket.socket, *, while_sending: bool) -> None:
    """Have a TCP connection end ``SILENCE_S`` after the other host was heard of last.

    And have its frames sent at once. The kernel asks that host for a sign of life (keepalive) only
    while nothing is on its way to it; ``while_sending``: the same bound holds while something is.
    It then also ends a connection whose other process reads nothing for so long, though its host
    answers. Ranks read whenever something is sent to them, so the engine's end has that bound. A
    rank's end has not: ComfyUI's process may stand still (a debugger, Ctrl-Z, a paused container)
    while a result is on its way. The rank's watcher asks ``Channel.is_unheard`` instead.
    """
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, SILENCE_S)
    if while_sending:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE_S)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Channel:
    """One end of a stream of frames. Any thread may send; one at a time receives.

    Receiving never waits, not even for the rest of a frame: a side that stops in the middle of
    one cannot stop the other.
    """

    def __init__(self, stream: socket.socket) -> None:
        self.ended = False  # the other side is gone and sends no more
        self.cut_off = False  # it did so without a word, over a network
        self._stream = stream
        self._sending = threading.Lock()
        self._received = bytearray()

    @classmethod
    def pair(cls) -> tuple["Channel", socket.socket]:
        """This process's end, and the other as a socket to hand to a rank and then close."""
        ours, theirs = socket.socketpair()
        return cls(ours), theirs

    @classmethod
    def inherited(cls, fd: int) -> "Channel":
        """The end that this process was started with; its own children do not get it."""
        stream = socket.socket(fileno=fd)
        stream.set_inheritable(False)
        return cls(stream)

    def fileno(self) -> int:
        """The file descriptor, so that ``wait`` takes a channel. Ready also when ``ended``."""
        return self._stream.fileno()

    def send(self, frame: bytes) -> None:
        """Waits for as long as the other side reads nothing; ``close`` ends the wait.

        Raises:
            EOFError: the other side is gone.
        """
        with self._sending:
            try:
                self._stream.sendall(_LENGTH.pack(len(frame)) + frame)
            except OSError as error:
                self.cut_off |= error.errno in _UNHEARD
                raise EOFError(f"the other side is gone ({error})") from error

    def receive(self) -> list[bytes]:
        """The frames that have arrived whole, in order; sets ``ended`` when no more will come.

        Raises:
            ProtocolError: a frame is longer than a frame may be.
        """
        frames: list[bytes] = []
        while not self.ended:
            try:
                data = self._stream.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as error:
                self.cut_off |= error.errno in _UNHEARD
                data = b""
            self.ended = not data
            self._received += data
            frames += self._take_frames()
        return frames

    def _take_frames(self) -> list[bytes]:
        frames = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > MAX_FRAME_BYTES:
                raise ProtocolError(f"A frame of {length} bytes; at most {MAX_FRAME_BYTES} fit.")
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            frames.append(bytes(self._received[_LENGTH.size : end]))
            del self._received[:end]
        return frames

    def is_unheard(self) -> bool:
        """Whether the other host has acknowledged nothing of what was sent for ``SILENCE_S``.

        One whose process has no room for more is asked by the kernel, more and more seldom, and
        answers. On one machine there is no other host.
        """
        if self._stream.family == socket.AF_UNIX:
            return False
        info = self._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        num_questions, num_packets, silence_ms = _TCP_INFO.unpack(info)
        # The answer to one question may be on its way.
        return silence_ms > 1000 * SILENCE_S and (num_packets > 0 or num_questions > 1)

    def close(self) -> None:
        """Idempotent; ends a ``send`` of another thread."""
        with contextlib.suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)
        with self._sending:  # the file descriptor's number may be another file's afterwards
            self._stream.close()
