"""However GPUs order what `HostWire` has put into their streams, none waits for ever."""

import contextlib
import mmap
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_runtime.gpu import host_wire
from tp_runtime.gpu.host_wire import CHUNK_BYTES, RING, HostWire

# Whether it gives, which other rank, and how many chunks of that kind went before.
Move = tuple[bool, int, int]


class Stream:
    """`ends`: the moves that what comes next has to wait for."""

    def __init__(self, *_: object) -> None:
        self.ends: frozenset[Move] = frozenset()

    def wait_stream(self, other: "Stream") -> None:
        self.ends |= other.ends

    def wait_event(self, event: frozenset[Move]) -> None:
        self.ends |= event

    def record_event(self) -> frozenset[Move]:
        return self.ends


@pytest.fixture
def moves_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[Move, frozenset[Move]]]:
    """`moves_of(rank, size, exchanges, chunks)`: each move, and the moves that it comes after."""
    current = [Stream()]

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    fakes = {
        "Stream": Stream,
        "stream": within,
        "current_stream": lambda *_: current[-1],
        "cudart": lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0),
        "check_error": lambda _: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def found(rank: int, size: int, exchanges: int, chunks: int) -> dict[Move, frozenset[Move]]:
        moves: dict[Move, frozenset[Move]] = {}
        current[:] = [Stream()]

        def move(_: HostWire, __: torch.Tensor, other: int, *, gives: bool) -> None:
            number = sum(known[:2] == (gives, other) for known in moves)
            moves[gives, other, number] = current[-1].ends
            current[-1].ends = frozenset([(gives, other, number)])

        monkeypatch.setattr(HostWire, "_move", move)
        memory = mmap.mmap(-1, host_wire.memory_bytes(size))
        wire = HostWire(memory, rank, size, torch.device("cpu"))
        parts = [torch.empty(chunks * CHUNK_BYTES, dtype=torch.uint8) for _ in range(size)]
        for wait in [wire.begin(parts, [*parts]) for _ in range(exchanges)]:
            wait()
        return moves

    return found


def any_order(moves: dict[Move, frozenset[Move]], chance: random.Random) -> list[Move]:
    order: list[Move] = []
    left = dict(moves)
    while left:
        move = chance.choice([one for one, before in left.items() if before <= {*order}])
        order.append(move)
        del left[move]
    return order


def all_end(orders: list[list[Move]]) -> bool:
    """Whether every rank comes to the end of its order, one move behind another."""
    done: dict[Any, int] = {}  # of pairs of ranks: chunks given, and chunks taken

    def can(rank: int, move: Move) -> bool:
        gives, other, number = move
        if gives:
            return done.get((False, other, rank), 0) > number - RING
        return done.get((True, other, rank), 0) > number

    left = [list(reversed(order)) for order in orders]
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(left):
            while order and can(rank, order[-1]):
                gives, other, _ = order.pop()
                done[gives, rank, other] = done.get((gives, rank, other), 0) + 1
                moved = True
    return not any(left)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("exchanges", "chunks"), [(1, 9), (2, 5), (4, 3)])
def test_no_order_waits_for_ever(
    moves_of: Callable[..., dict[Move, frozenset[Move]]], size: int, exchanges: int, chunks: int
) -> None:
    moves = [moves_of(rank, size, exchanges, chunks) for rank in range(size)]
    assert min(len(of_rank) for of_rank in moves) >= 2 * exchanges * chunks
    for seed in range(20):
        chance = random.Random(seed)
        assert all_end([any_order(of_rank, chance) for of_rank in moves]), seed
