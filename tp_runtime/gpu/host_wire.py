"""Exchanges between GPUs of one host that cannot reach each other's memory, by their copy engines.

There, kernels of NCCL write to the host's memory and read from it: 21 MB each way between two H200s
take them 0.94 ms, and copies through the same memory 0.62, which also leave the multiprocessors to
others.

Every rank has a ring of chunks for each other one, with a flag each. What another rank is to have
is copied to the next chunk, once its flag says that it is free; then the flag says that it is full.
That rank's GPU waits for this, copies the chunk, and frees it. Streams do all of it, so a CUDA
graph can record it: a replay finds all chunks free, wherever in the rings it begins.

Two ranks never wait for each other for ever, in whichever order a GPU works through what does not
depend on one another: a rank takes chunk N only after it gave its own chunk N, and gives that only
after it took chunk N - ``RING``. What it waits for then, the others can give or take.
"""

import collections
import contextlib
import itertools
import logging
import mmap
import os
import secrets
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ..wire import stream_wait
from .words import said_by_all

logger = logging.getLogger("tp_runtime.gpu.host_wire")

CHUNK_BYTES, LEAST_CHUNK_BYTES = 2**22, 2**19
RING = 4  # chunks: a large part for one rank is cut in so many at least: both ways overlap
_FREE, _FULL = 0, 1
_FLAG_BYTES = 64  # a cache line of its own
_TOKEN_BYTES = 4096  # a page


class HostWire:
    """What a rank's exchanges with the other ranks of a group go through."""

    def __init__(self, memory: mmap.mmap, rank: int, size: int, device: torch.device) -> None:
        """``memory``: of ``memory_bytes(size)``, which the group's ranks share; locks its pages.

        ``rank``: of this process, in the group of ``size``. Raises RuntimeError if CUDA refuses.
        """
        self._rank, self._size, self._device = rank, size, device
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        register = torch.cuda.cudart().cudaHostRegister
        torch.cuda.check_error(register(self._memory.data_ptr(), self._memory.nbytes, 0))
        num_bytes = _data_bytes(size)
        flags, chunks = self._memory.tensor_split([self._memory.nbytes - num_bytes])
        self._flags = flags[_TOKEN_BYTES:].view(-1, _FLAG_BYTES)
        self._chunks = chunks.view(-1, CHUNK_BYTES)
        pairs = itertools.permutations(range(size), 2)
        # Of each pair of ranks, how many chunks the one has given to the other.
        self._num_given = dict.fromkeys(pairs, 0)
        self._giving, self._taking = (torch.cuda.Stream(device) for _ in range(2))
        # Of the exchanges under way: how many there are, and when the latest chunks were taken.
        self._num_under_way = 0
        self._taken: collections.deque[torch.cuda.Event] = collections.deque(maxlen=RING)

    def close(self) -> None:
        """Have the system use the memory for something else; when nothing is under way."""
        torch.cuda.synchronize(self._device)
        unregister = torch.cuda.cudart().cudaHostUnregister
        torch.cuda.check_error(unregister(self._memory.data_ptr()))

    def begin(
        self, parts: Sequence[torch.Tensor], received: Sequence[torch.Tensor]
    ) -> Callable[[], None]:
        """Give each rank its part, and take what each gives to this one; bytes on the GPU.

        Returns at once what has the current stream wait for it. Until then ``parts`` must keep
        their values.
        """
        current = torch.cuda.current_stream(self._device)
        self._giving.wait_stream(current)
        self._taking.wait_stream(current)
        others = [(self._rank + step) % self._size for step in range(1, self._size)]
        given = [_in_chunks(parts[other], len(others)) for other in others]
        taken = [_in_chunks(received[other], len(others)) for other in others]
        self._num_under_way += 1
        for index in range(max(map(len, (*given, *taken)))):
            if len(self._taken) == RING:
                self._giving.wait_event(self._taken[0])
            with torch.cuda.stream(self._giving):
                for other, chunks in zip(others, given, strict=True):
                    if index < len(chunks):
                        self._move(chunks[index], other, gives=True)
            self._taking.wait_event(self._giving.record_event())
            with torch.cuda.stream(self._taking):
                for other, chunks in zip(others, taken, strict=True):
                    if index < len(chunks):
                        self._move(chunks[index], other, gives=False)
            self._taken.append(self._taking.record_event())
        ends = [stream.record_event() for stream in (self._giving, self._taking)]
        received[self._rank].copy_(parts[self._rank])

        def wait() -> None:
            for end in ends:
                torch.cuda.current_stream(self._device).wait_event(end)
            for chunks in (given, taken):  # until now other streams use their memory
                chunks.clear()
            self._num_under_way -= 1
            if not self._num_under_way:  # and a recording knows no event from before it
                self._taken.clear()

        return wait

    def _move(self, chunk: torch.Tensor, other: int, *, gives: bool) -> None:
        """Copy a chunk to the ring or from it, when that is its turn."""
        pair = (self._rank, other) if gives else (other, self._rank)
        ring = list(self._num_given).index(pair)
        place = RING * ring + self._num_given[pair] % RING
        self._num_given[pair] += 1
        flag, there = self._flags[place].data_ptr(), self._chunks[place, : chunk.nbytes]
        before, after = (_FREE, _FULL) if gives else (_FULL, _FREE)
        stream_wait.until(self._device, flag, before, stream_wait.EQUAL)
        source, target = (chunk, there) if gives else (there, chunk)
        target.copy_(source, non_blocking=True)
        stream_wait.write(self._device, flag, after)


def connected(group: dist.ProcessGroup, device: torch.device) -> HostWire | None:
    """A wire between all ranks of a group on the CPU, which are on one host. All must ask.

    None if one of them cannot have it, for lack of memory, for example; the log says why.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    problem, wire = "", None
    with contextlib.ExitStack() as opened:
        offered = None
        try:
            if not stream_wait.is_possible(device):
                raise OSError("its streams cannot wait for numbers in the host's memory")
            if rank == 0:
                offered = _offer(size, opened)
        except OSError as error:
            problem = str(error)
        offer, *_ = said_by_all(group, offered)
        try:
            if offer is not None and not problem:
                wire = HostWire(_accept(offer, size), rank, size, device)
        except (OSError, RuntimeError) as error:
            problem = str(error)
        said = enumerate(said_by_all(group, problem))
        problems = [f"rank {of}: {words}" for of, words in said if words]
    if not problems:
        return wire
    if wire is not None:
        wire.close()
    if rank == 0:
        logger.warning("NCCL exchanges tokens, for there is no faster way: %s", "; ".join(problems))
    return None


def _offer(size: int, opened: contextlib.ExitStack) -> tuple[int, int, bytes]:
    """Where others find new memory, as long as it is open here; and how they know it."""
    fd = os.memfd_create("tp-runtime-wire", os.MFD_CLOEXEC)
    opened.callback(os.close, fd)
    # Without this, a lack of memory would be a SIGBUS at the first write.
    os.posix_fallocate(fd, 0, memory_bytes(size))
    token = secrets.token_bytes(16)
    os.pwrite(fd, token, 0)
    return os.getpid(), fd, token


def _accept(offer: tuple[int, int, bytes], size: int) -> mmap.mmap:
    """The memory that another rank offers. Raises OSError if this process cannot see it."""
    pid, fd, token = offer
    with open(f"/proc/{pid}/fd/{fd}", "r+b", buffering=0) as file:
        if os.pread(file.fileno(), len(token), 0) != token:
            raise OSError(f"process {pid} is another one here")
        return mmap.mmap(file.fileno(), memory_bytes(size))


def memory_bytes(size: int) -> int:
    """What the ranks of a group of so many share."""
    return _TOKEN_BYTES + _FLAG_BYTES * RING * size * (size - 1) + _data_bytes(size)


def _data_bytes(size: int) -> int:
    return CHUNK_BYTES * RING * size * (size - 1)


def _in_chunks(part: torch.Tensor, num_others: int) -> Sequence[torch.Tensor]:
    """A few, as both ways shall overlap, but none that are hardly worth a copy.

    What goes to one rank overlaps with what comes from others, too: of several, fewer are enough.
    """
    if not part.nbytes:
        return ()
    few = min(-(-RING // num_others), -(-part.nbytes // LEAST_CHUNK_BYTES))
    count = max(-(-part.nbytes // CHUNK_BYTES), few)
    return part.split(-(-part.nbytes // count))
