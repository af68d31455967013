"""Frames over a socket pair: whole, in order, and never waiting for a side that has stopped."""

import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tp_runtime.errors import ProtocolError
from tp_runtime.wire.protocol import MAX_FRAME_BYTES
from tp_runtime.wire.transport import Channel, Readiness, wait


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, stream = Channel.pair()
    theirs = Channel(stream)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def raw() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the other end as a plain socket."""
    ours, stream = Channel.pair()
    yield ours, stream
    ours.close()
    stream.close()


def test_frames_arrive_whole_and_in_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    frames = [b"a", b"", b"b" * 1000]
    for frame in frames:
        ours.send(frame)
    assert wait([theirs], 1.0) == [theirs]
    assert theirs.receive() == frames
    assert theirs.receive() == []
    assert wait([theirs], 0.0) == []


def test_readiness(pair: tuple[Channel, Channel]) -> None:
    """Of channels and file descriptors."""
    ours, theirs = pair
    wake_fd = os.eventfd(0)
    ready = Readiness([theirs, wake_fd])
    assert ready.wait(0) == []
    os.eventfd_write(wake_fd, 1)
    assert ready.wait(1.0) == [wake_fd]
    os.eventfd_read(wake_fd)
    ours.send(b"frame")
    assert ready.wait(1.0) == [theirs]
    assert theirs.receive() == [b"frame"]
    assert ready.wait(0) == []
    os.close(wake_fd)
    ours.close()
    assert ready.wait(1.0) == [theirs]
    theirs.close()
    assert ready.wait(0) == []
    for _ in range(2):
        ready.close()
    assert ready.wait(0) == []


def test_both_directions_are_independent(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.send(b"to them")
    theirs.send(b"to us")
    assert (ours.receive(), theirs.receive()) == ([b"to us"], [b"to them"])


def test_a_long_frame_arrives_in_pieces(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    frame = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
    sender = threading.Thread(target=ours.send, args=[frame])
    sender.start()
    received: list[bytes] = []
    while not received:
        assert wait([theirs], 5.0)
        received = theirs.receive()
    sender.join()
    assert received == [frame]


def test_half_a_frame_is_not_waited_for(raw: tuple[Channel, socket.socket]) -> None:
    channel, stream = raw
    frame = struct.pack(">I", 4) + b"body"
    for piece in (frame[:2], frame[2:6]):
        stream.sendall(piece)
        assert channel.receive() == []
    stream.sendall(frame[6:] + frame)
    assert channel.receive() == [b"body", b"body"]


def test_the_end_comes_after_the_last_frame(raw: tuple[Channel, socket.socket]) -> None:
    channel, stream = raw
    stream.sendall(struct.pack(">I", 4) + b"last" + b"\0\0")
    stream.close()
    assert channel.receive() == [b"last"]
    assert channel.ended
    assert wait([channel], 0.0) == [channel]
    assert channel.receive() == []


def test_sending_to_nobody_says_so(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(EOFError):
        ours.send(b"frame")


def test_a_frame_that_is_too_long_is_refused_at_once(
    raw: tuple[Channel, socket.socket],
) -> None:
    channel, stream = raw
    stream.sendall(struct.pack(">I", MAX_FRAME_BYTES + 1))
    with pytest.raises(ProtocolError, match=f"at most {MAX_FRAME_BYTES} fit"):
        channel.receive()


def test_close_ends_a_send_that_nobody_reads(raw: tuple[Channel, socket.socket]) -> None:
    channel, _ = raw
    errors: list[BaseException] = []

    def send() -> None:
        try:
            channel.send(b"x" * MAX_FRAME_BYTES)
        except EOFError as error:
            errors.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(0.1)
    assert sender.is_alive()
    channel.close()
    sender.join(5.0)
    assert not sender.is_alive()
    assert len(errors) == 1


def test_close_twice(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    ours.close()
    ours.close()
    with pytest.raises(EOFError):
        ours.send(b"frame")
    assert ours.receive() == []
    assert ours.ended
    assert theirs.receive() == []
    assert theirs.ended


def test_an_inherited_end_is_not_inherited_again() -> None:
    ours, stream = Channel.pair()
    stream.set_inheritable(True)
    theirs = Channel.inherited(stream.detach())
    ours.send(b"frame")
    assert theirs.receive() == [b"frame"]
    assert not socket.socket(fileno=theirs.fileno()).get_inheritable()
    ours.close()
