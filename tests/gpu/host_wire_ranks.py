"""Ranks that exchange through the host's memory, on as many GPUs as there are.

    python host_wire_ranks.py RANKS FOLDER

Each checks what it gets.
"""

import itertools
import random
from pathlib import Path

import torch
import torch.distributed as dist

from support.forked_ranks import run_ranks
from tp_runtime.gpu import host_wire

# Bytes from one rank to another: none, less than a chunk, several, more than a ring holds.
SIZES = (0, 1, 300, 2**19 + 5, 5 * 2**20 + 1, 18 * 2**20 + 3)
ROUNDS, RECORDED, REPLAYS = 6, 3, 4


def value(source: int, target: int, turn: int) -> int:
    return (7 * source + 31 * target + 3 * turn) % 251


def check(wire: host_wire.HostWire, rank: int, size: int, device: torch.device) -> None:
    """One after another; and recorded, several under way at once, of what is computed before."""
    drawn = random.Random(size)  # the same in each rank
    ranks = range(size)
    for turn in range(ROUNDS):
        sizes = {pair: drawn.choice(SIZES) for pair in itertools.product(ranks, repeat=2)}

        def bytes_of(
            pair: tuple[int, int], sizes: dict[tuple[int, int], int] = sizes
        ) -> torch.Tensor:
            return torch.zeros(sizes[pair], dtype=torch.uint8, device=device)

        parts = [bytes_of((rank, other)) for other in ranks]
        received = [[bytes_of((other, rank)) for other in ranks] for _ in range(RECORDED)]
        for other in ranks:
            parts[other].fill_(value(rank, other, turn))
        wire.begin(parts, received[0])()
        for other in ranks:
            assert bool((received[0][other] == value(other, rank, turn)).all()), (turn, other)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            waits = []
            for index in range(RECORDED):
                given = [part + index for part in parts]
                waits.append(wire.begin(given, received[index]))
            for wait in waits:
                wait()
            for of_index in received:
                for one in of_index:
                    one += 1
        for replay in range(REPLAYS):
            for other in ranks:
                parts[other].fill_(value(rank, other, replay))
            graph.replay()
            for index, other in itertools.product(range(RECORDED), ranks):
                expected = (value(other, rank, replay) + index + 1) % 256
                assert bool((received[index][other] == expected).all()), (turn, replay, other)


def compute(rank: int, size: int, _folder: Path) -> None:
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    wire = host_wire.connected(dist.group.WORLD, device)
    assert wire is not None
    check(wire, rank, size, device)
    dist.barrier()
    wire.close()


if __name__ == "__main__":
    run_ranks(compute)
