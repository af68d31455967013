"""Who may be a rank of a group over a network: whoever knows its token.

Three messages of fixed lengths; a connection that does otherwise is closed before a frame is read::

    engine to rank    32 random bytes
    rank to engine    32 random bytes, what the rank says of itself, HMAC-SHA256 over all of that
    engine to rank    HMAC-SHA256 over the same, as the engine

Both sides prove that they know the token and neither shows it. Nothing can be replayed, since the
random bytes are new; frames that follow are neither signed nor encrypted.
"""

import hmac
import logging
import os
import socket
import struct
import time
from dataclasses import dataclass, field

from .transport import bound_silence, wait

logger = logging.getLogger("tp_runtime")

TOKEN_BYTES = 32
TIMEOUT_S = 5.0
MAX_STRANGERS = 32  # connections that have not proved themselves yet

_NONCE_BYTES = 32
_MEMBER = struct.Struct(">II?d")
_MAC_BYTES = 32
_PROOF_BYTES = _NONCE_BYTES + _MEMBER.size + _MAC_BYTES


@dataclass(frozen=True)
class Member:
    """What a rank says of itself. ``mirrored``: it does not share the engine's exchange memory.

    ``time_s``: its monotonic clock, now.
    """

    rank: int
    pid: int
    mirrored: bool
    time_s: float

    def pack(self) -> bytes:
        return _MEMBER.pack(self.rank, self.pid, self.mirrored, self.time_s)


def new_token() -> bytes:
    """A secret for one group."""
    return os.urandom(TOKEN_BYTES)


def _mac(token: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(token, b"tp-runtime " + role + b"".join(parts), "sha256")


# --- the rank's side ---------------------------------------------------------------------------


def join(address: tuple[str, int], token: bytes, member: Member) -> socket.socket:
    """A stream to the engine at ``address``, each side having proved itself to the other.

    Raises:
        ConnectionError: whoever listens there does not know the token, or refuses.
        OSError: nobody listens, or nobody answers in time.
    """
    stream = socket.create_connection(address, TIMEOUT_S)
    try:
        stream.settimeout(TIMEOUT_S)
        theirs = _receive(stream, _NONCE_BYTES)
        ours, said = os.urandom(_NONCE_BYTES), member.pack()
        stream.sendall(ours + said + _mac(token, b"rank", theirs, ours, said))
        answer = _receive(stream, _MAC_BYTES)
        if not hmac.compare_digest(answer, _mac(token, b"engine", theirs, ours, said)):
            raise ConnectionRefusedError(f"whoever listens at {address} is not the group's engine")
        stream.settimeout(None)
        bound_silence(stream, while_sending=False)
    except BaseException:
        stream.close()
        raise
    return stream


def _receive(stream: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = stream.recv(length - len(data))
        if not part:
            raise ConnectionResetError("the engine refused this rank; its log says why")
        data += part
    return data


# --- the engine's side -------------------------------------------------------------------------


@dataclass
class _Stranger:
    stream: socket.socket
    address: str
    nonce: bytes = field(default_factory=lambda: os.urandom(_NONCE_BYTES))
    received: bytes = b""
    deadline: float = field(default_factory=lambda: time.monotonic() + TIMEOUT_S)


class Reception:
    """Listens for the ranks of one group, as a context; ``take`` gives the ranks that have come.

    ``members``: rank → what it said, when (on this process's monotonic clock), and its stream.
    """

    def __init__(self, host: str, token: bytes, num_ranks: int) -> None:
        self.members: dict[int, tuple[Member, float, socket.socket]] = {}
        self._token = token
        self._num_ranks = num_ranks
        self._strangers: list[_Stranger] = []
        self._listener = socket.create_server((host, 0), backlog=MAX_STRANGERS)
        self._listener.setblocking(False)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def complete(self) -> bool:
        return len(self.members) == self._num_ranks

    def receive(self, timeout_s: float) -> None:
        """Wait for somebody to come or to speak, and deal with it."""
        ready = wait([self._listener, *(one.stream for one in self._strangers)], timeout_s)
        if self._listener in ready:
            self._admit()
        for stranger in list(self._strangers):
            if stranger.stream in ready:
                self._listen_to(stranger)
            elif time.monotonic() > stranger.deadline:
                self._refuse(stranger, f"it said nothing that counts for {TIMEOUT_S:g} s")

    def _admit(self) -> None:
        try:
            stream, address = self._listener.accept()
        except OSError:  # gone again
            return
        stranger = _Stranger(stream, address[0])
        self._strangers.append(stranger)
        if len(self._strangers) > MAX_STRANGERS:
            self._refuse(stranger, f"{MAX_STRANGERS} others are trying already")
            return
        stream.setblocking(False)
        self._say(stranger, stranger.nonce)

    def _say(self, stranger: _Stranger, data: bytes) -> bool:
        """Whether it is there to hear it. Does not wait: the buffer has room for so little."""
        try:
            stranger.stream.send(data)
        except OSError:
            self._refuse(stranger, "it left")
            return False
        return True

    def _listen_to(self, stranger: _Stranger) -> None:
        try:
            data = stranger.stream.recv(_PROOF_BYTES - len(stranger.received))
        except OSError:
            data = b""
        stranger.received += data
        if not data:
            self._refuse(stranger, "it left")
        elif len(stranger.received) == _PROOF_BYTES:
            self._judge(stranger)

    def _judge(self, stranger: _Stranger) -> None:
        ours, proof = stranger.nonce, stranger.received
        theirs, said = proof[:_NONCE_BYTES], proof[_NONCE_BYTES:-_MAC_BYTES]
        expected = _mac(self._token, b"rank", ours, theirs, said)
        if not hmac.compare_digest(proof[-_MAC_BYTES:], expected):
            self._refuse(stranger, "it does not know the group's token")
            return
        member = Member(*_MEMBER.unpack(said))
        if member.rank >= self._num_ranks or member.rank in self.members:
            self._refuse(stranger, f"rank {member.rank} is there already, or is none")
            return
        if not self._say(stranger, _mac(self._token, b"engine", ours, theirs, said)):
            return
        stranger.stream.setblocking(True)
        bound_silence(stranger.stream, while_sending=True)
        self._strangers.remove(stranger)
        self.members[member.rank] = (member, time.monotonic(), stranger.stream)

    def _refuse(self, stranger: _Stranger, why: str) -> None:
        logger.warning("refused a connection from %s to a group: %s", stranger.address, why)
        self._strangers.remove(stranger)
        stranger.stream.close()

    def take(self) -> list[tuple[Member, float, socket.socket]]:
        """The members in the order of their ranks; their streams are the caller's."""
        members, self.members = self.members, {}
        return [member for _, member in sorted(members.items())]

    def __enter__(self) -> "Reception":
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer, and close the connections that ``take`` has not given."""
        self._listener.close()
        for member in self.members.values():
            member[-1].close()
        for stranger in list(self._strangers):
            self._refuse(stranger, "the group is complete, or was given up")
