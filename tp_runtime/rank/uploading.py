"""Brings slices of a model file to a GPU at the speed of memory.

A copy from a mapped file straight to a GPU goes through one small buffer of the driver, and meets
the disk one page at a time. Here several threads read at once, each into page-locked buffers of its
own, of which one is filled while the other travels.
"""

import ctypes
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from .. import machine

MAX_THREADS = 8
BUFFER_BYTES = 8 * 2**20  # two a thread


class _Buffers:
    """Of one thread: page-locked memory in two halves, and the stream that they travel on."""

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        self.halves = deque((half, torch.cuda.Event()) for half in memory)
        self.stream = torch.cuda.Stream(device)


class Uploads:
    """Copies under way to one GPU: a context manager, which ends when all have arrived."""

    def __init__(self, device: torch.device, num_ranks: int) -> None:
        """``num_ranks`` share the machine's cores."""
        num_threads = max(1, min(MAX_THREADS, machine.cores() // num_ranks))
        self._memory = torch.empty(num_threads, 2, BUFFER_BYTES, dtype=torch.uint8)
        address, size = self._memory.data_ptr(), self._memory.nbytes
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        self._unused = [_Buffers(memory, device) for memory in self._memory]
        self._mine = threading.local()
        self._under_way: deque[Future[None]] = deque()
        self._limit = 2 * num_threads
        self._pool = ThreadPoolExecutor(num_threads, "upload", self._take_buffers)

    def _take_buffers(self) -> None:
        self._mine.buffers = self._unused.pop()

    def __enter__(self) -> "Uploads":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        torch.cuda.synchronize()
        address = self._memory.data_ptr()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        if kind is None:
            while self._under_way:
                self._under_way.popleft().result()

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy in the background, to the GPU or the host; waits while many are under way.

        Raises what an earlier copy has raised.
        """
        while len(self._under_way) >= self._limit:
            self._under_way.popleft().result()
        self._under_way.append(self._pool.submit(self._copy, source, target))

    @torch.inference_mode()
    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.ndim == 0:
            source, target = source[None], target[None]
        if source.numel() == 0:
            return
        if not target.is_cuda:
            target.copy_(source)
            return
        buffers: _Buffers = self._mine.buffers
        # What was zeroed there, to be padding, must not be overtaken.
        buffers.stream.wait_stream(torch.cuda.default_stream(target.device))
        row_bytes = source[0].nbytes
        num_rows = BUFFER_BYTES // row_bytes
        assert num_rows, f"a row of {row_bytes} bytes"
        with torch.cuda.stream(buffers.stream):
            for start in range(0, len(source), num_rows):
                rows = source[start : start + num_rows]
                half, sent = buffers.halves[0]
                buffers.halves.rotate()
                sent.synchronize()
                staged = half[: rows.nbytes].view(rows.dtype).view(rows.shape)
                if rows.is_contiguous():
                    ctypes.memmove(staged.data_ptr(), rows.data_ptr(), rows.nbytes)
                else:
                    staged.copy_(rows)
                place = target[start : start + num_rows]
                if staged.dtype != place.dtype:
                    staged = staged.to(place.device, non_blocking=True)
                place.copy_(staged, non_blocking=True)
                sent.record()
