"""Who is let in: whoever knows the token, once, and in time. Strangers harm nobody."""

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tp_runtime.wire import handshake, transport
from tp_runtime.wire.handshake import Member, Reception, join, new_token
from tp_runtime.wire.transport import Channel, wait

NUM_RANKS = 2


def member(rank: int) -> Member:
    return Member(rank, os.getpid(), True, time.monotonic())


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests share the machine's cores."""
    monkeypatch.setattr(handshake, "TIMEOUT_S", 60.0)


@pytest.fixture
def token() -> bytes:
    return new_token()


@pytest.fixture
def reception(token: bytes, caplog: pytest.LogCaptureFixture) -> Iterator[Reception]:
    caplog.set_level(logging.WARNING)
    with Reception("127.0.0.1", token, NUM_RANKS) as reception:
        yield reception


def in_background(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """What `work` returns or raises, later."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def receive_until(reception: Reception, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline
        reception.receive(0.05)


def let_in(reception: Reception, token: bytes, rank: int) -> socket.socket:
    """The rank's end, after it has joined."""
    thread, found = in_background(lambda: join(reception.address, token, member(rank)))
    receive_until(reception, lambda: not thread.is_alive())
    assert isinstance(found[0], socket.socket), found
    return found[0]


def stranger(reception: Reception) -> socket.socket:
    """A connection that has got its random bytes, and has said nothing yet."""
    stream = socket.create_connection(reception.address, 5.0)
    before = len(reception._strangers)
    receive_until(reception, lambda: len(reception._strangers) > before)
    assert len(stream.recv(1000)) == 32
    return stream


def assert_refused(
    reception: Reception, stream: socket.socket, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection is closed and the log says why; the group comes together all the same."""
    receive_until(reception, lambda: bool(wait([stream], 0.0)))
    with contextlib.suppress(ConnectionResetError):  # there was more than had been read
        assert stream.recv(1) == b""
    assert f"refused a connection from 127.0.0.1 to a group: {why}" in caplog.text


def assert_unharmed(reception: Reception, token: bytes) -> None:
    """All ranks come in, and their frames arrive."""
    ends = {
        rank: let_in(reception, token, rank)
        for rank in range(NUM_RANKS)
        if rank not in reception.members
    }
    assert reception.complete()
    for said, _, stream in reception.take():
        if said.rank in ends:
            Channel(ends[said.rank]).send(b"frame")
            channel = Channel(stream)
            assert wait([channel], 5.0)
            assert channel.receive() == [b"frame"]
            channel.close()
            ends[said.rank].close()


def test_ranks_in_any_order(reception: Reception, token: bytes) -> None:
    ends = [let_in(reception, token, rank) for rank in (1, 0)]
    assert reception.complete()
    members = reception.take()
    assert [said.rank for said, _, _ in members] == [0, 1]
    assert all(said.pid == os.getpid() and said.mirrored for said, _, _ in members)
    for stream in [*ends, *(stream for _, _, stream in members)]:
        stream.close()


def test_nobody_listens_afterwards(token: bytes) -> None:
    with Reception("127.0.0.1", token, 1) as reception:
        address = reception.address
        let_in(reception, token, 0).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 1.0)


def test_a_wrong_token(
    reception: Reception, token: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    thread, found = in_background(lambda: join(reception.address, new_token(), member(0)))
    receive_until(reception, lambda: not thread.is_alive())
    assert isinstance(found[0], ConnectionError)
    assert "it does not know the group's token" in caplog.text
    assert not reception.members
    assert_unharmed(reception, token)


def test_a_frame_that_is_too_long(
    reception: Reception, token: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody who has not proved himself makes us read more than a proof."""
    stream = stranger(reception)
    stream.sendall(struct.pack(">I", 2**32 - 1) + b"x" * 100_000)
    assert_refused(reception, stream, "it does not know the group's token", caplog)
    assert_unharmed(reception, token)


def test_a_replay(reception: Reception, token: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What a rank said once proves nothing the next time: the random bytes are others."""
    heard: list[bytes] = []
    relay = socket.create_server(("127.0.0.1", 0))

    def listen_in() -> None:
        rank, _ = relay.accept()
        engine = socket.create_connection(reception.address, 5.0)
        rank.sendall(engine.recv(32))
        heard.append(rank.recv(1000))
        engine.sendall(heard[0])
        rank.sendall(engine.recv(32))
        rank.close()
        engine.close()

    in_background(listen_in)
    address = relay.getsockname()
    thread, _ = in_background(lambda: join(address, token, member(0)))
    receive_until(reception, lambda: not thread.is_alive())
    assert set(reception.members) == {0}
    stream = stranger(reception)
    stream.sendall(heard[0])
    assert_refused(reception, stream, "it does not know the group's token", caplog)
    assert_unharmed(reception, token)
    relay.close()


def test_silence(reception: Reception, token: bytes, caplog: pytest.LogCaptureFixture) -> None:
    streams = [stranger(reception) for _ in range(3)]
    streams[1].sendall(b"x")
    assert all(one.deadline > time.monotonic() for one in reception._strangers)
    for one in reception._strangers:
        one.deadline = time.monotonic()
    for stream in streams:
        assert_refused(reception, stream, "it said nothing that counts for 60 s", caplog)
    assert_unharmed(reception, token)


def test_a_crowd(
    reception: Reception,
    token: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So many and no more; a rank that was turned away gets in when their time is over."""
    monkeypatch.setattr(handshake, "MAX_STRANGERS", 3)
    crowd = [stranger(reception) for _ in range(3)]
    one_more = socket.create_connection(reception.address, 5.0)
    assert_refused(reception, one_more, "3 others are trying already", caplog)
    for stream in crowd:
        stream.close()
    receive_until(reception, lambda: not reception._strangers)
    assert_unharmed(reception, token)


def test_one_who_hangs_up_rudely(
    reception: Reception, token: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A reset before and after the random bytes."""
    for is_admitted in (False, True):
        if is_admitted:
            stream = stranger(reception)
        else:
            stream = socket.create_connection(reception.address, 5.0)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()
        for _ in range(3):
            reception.receive(0.05)
    assert not reception._strangers
    assert caplog.text.count("it left") == 2
    assert_unharmed(reception, token)


@pytest.mark.parametrize("rank", [0, NUM_RANKS])
def test_no_rank_of_this_group(
    reception: Reception, token: bytes, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    first = let_in(reception, token, 0)
    thread, found = in_background(lambda: join(reception.address, token, member(rank)))
    receive_until(reception, lambda: not thread.is_alive())
    assert isinstance(found[0], ConnectionError)
    assert f"rank {rank} is there already, or is none" in caplog.text
    assert_unharmed(reception, token)
    first.close()


def test_a_rank_does_not_serve_a_stranger(token: bytes) -> None:
    """An engine that does not know the token learns nothing and is not obeyed."""
    server = socket.create_server(("127.0.0.1", 0))

    def pretend() -> None:
        stream, _ = server.accept()
        stream.sendall(os.urandom(32))
        stream.recv(1000)
        stream.sendall(os.urandom(32))

    in_background(pretend)
    with pytest.raises(ConnectionRefusedError, match="is not the group's engine"):
        join(server.getsockname(), token, member(0))
    server.close()


def test_an_engine_that_stands_still_keeps_its_ranks(
    reception: Reception, token: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its host is there, so a result that is on its way waits until it is read."""
    monkeypatch.setattr(transport, "SILENCE_S", 1)
    rank, engine = map(Channel, (let_in(reception, token, 0), reception.take()[0][-1]))
    frames = [bytes(2**20)] * 16  # more than the kernel keeps for a reader
    thread, _ = in_background(lambda: [rank.send(frame) for frame in frames])
    until_s = time.monotonic() + 5 * transport.SILENCE_S
    while time.monotonic() < until_s:
        assert not rank.is_unheard()
        time.sleep(0.1)
    assert thread.is_alive()
    received: list[bytes] = []
    while len(received) < len(frames):
        assert wait([engine], 5.0)
        received += engine.receive()
        assert not engine.ended
    thread.join()
    assert received == frames
    rank.close()
    engine.close()
