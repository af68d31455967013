"""A copy of the exchange memory where a rank cannot share the engine's.

What the engine has written for a request goes ahead of the request over the rank's stream, and a
result that the rank has written goes ahead of its ``Done``. No other part of either side knows.
"""

import os
from collections.abc import Iterable, Iterator

from .exchange import num_bytes
from .protocol import PIECE_BYTES, Piece, TensorRef


def pieces(written: Iterable[tuple[int, memoryview]]) -> Iterator[Piece]:
    """What was written, in messages of a bounded size."""
    for offset, data in written:
        for start in range(0, len(data), PIECE_BYTES):
            yield Piece(offset + start, data[start : start + PIECE_BYTES])


class Mirror:
    """A rank's own memory behind ``fd``, kept as the engine's is."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def put(self, piece: Piece) -> None:
        """Keep what the engine has written. Raises OSError if there is no memory for it."""
        self.grow(piece.offset + len(piece.data))
        os.pwrite(self._fd, piece.data, piece.offset)

    def grow(self, size: int) -> None:
        """Be at least ``size`` bytes. Raises OSError if there is no memory for it."""
        if size > os.fstat(self._fd).st_size:
            os.posix_fallocate(self._fd, 0, size)

    def pieces(self, ref: TensorRef) -> Iterator[Piece]:
        """A tensor that the rank has written, for the engine."""
        data = os.pread(self._fd, num_bytes(ref), ref.offset)
        yield from pieces([(ref.offset, memoryview(data))])
