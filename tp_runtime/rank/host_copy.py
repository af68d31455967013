"""A rank's tensors in the host's memory; of ranks that hold the same, all have one copy."""

import mmap
import os
from collections.abc import Callable, Mapping

import torch

_ALIGNMENT = 256


class PartMemory:
    """Host memory of the ranks that hold the same part of a model.

    All ranks of a group take and give back the same pieces of it in the same order, and meet
    meanwhile. ``leads``: whether this is the rank that writes what all of them read.
    """

    def __init__(self, fd: int, leads: bool, meet: Callable[[], None]) -> None:
        """``fd``: of a file in memory. ``meet`` returns when all ranks of the group called it."""
        self.leads = leads
        self.meet = meet
        self._fd = fd
        self._taken = 0  # of the file, which has holes where pieces were given back

    def take(self, size: int) -> mmap.mmap | None:
        """A new piece, mapped; None if it has no bytes. Raises OSError: there is no room."""
        start = self._taken
        self._taken += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        if self.leads and size:
            # Without this, a lack of memory would be a SIGBUS at the first write.
            os.posix_fallocate(self._fd, start, size)
        self.meet()
        return mmap.mmap(self._fd, size, offset=start) if size else None

    def give_back(self, piece: mmap.mmap | None) -> None:
        """Have the system use the memory for something else; nobody may read it any more."""
        self.meet()
        if self.leads and piece is not None:
            piece.madvise(mmap.MADV_REMOVE)


class HostMemory:
    """Tensors in one piece of host memory, without values; ``locked``: page-locked, for a GPU.

    One piece and not a tensor each, because torch rounds every page-locked tensor up to a power
    of two. Call ``close`` to give the memory back.
    """

    def __init__(
        self,
        like: Mapping[str, torch.Tensor],
        *,
        locked: bool,
        part_memory: PartMemory | None = None,
    ) -> None:
        """``like``: shapes and dtypes, by name. They lie one behind another.

        ``part_memory``: where they lie; None: in memory of this process alone.
        """
        offsets, size = {}, 0
        for name, tensor in like.items():
            offsets[name] = size
            size += aligned(tensor.nbytes)
        self._part_memory = part_memory
        self._piece = part_memory.take(size) if part_memory is not None else None
        if self._piece is not None:
            self._memory = torch.frombuffer(self._piece, dtype=torch.uint8)
        else:
            self._memory = torch.empty(size, dtype=torch.uint8)
        self._locked = size > 0 and locked
        if self._locked:
            address = self._memory.data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        self.tensors: dict[str, torch.Tensor] = {}
        for name, tensor in like.items():
            piece = self._memory[offsets[name] : offsets[name] + tensor.nbytes]
            self.tensors[name] = piece.view(tensor.dtype).view(tensor.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the tensors take."""
        return self._memory.nbytes

    def spanned(self, first: str, last: str) -> torch.Tensor:
        """The bytes from one tensor's beginning to where the next after that one, or after a later
        one, may begin: copies of such pieces, one behind another, are aligned as well.
        """
        base, end = self._memory.data_ptr(), self.tensors[last]
        start = self.tensors[first].data_ptr() - base
        return self._memory[start : aligned(end.data_ptr() - base + end.nbytes)]

    def close(self) -> None:
        """Give the memory back; the tensors must not be used any more."""
        if self._locked:
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
            self._locked = False
        self.tensors.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)
        part_memory, self._part_memory = self._part_memory, None
        if part_memory is not None:
            part_memory.give_back(self._piece)
            self._piece = None


class HostCopy(HostMemory):
    """Copies of tensors; page-locked if they come from a GPU."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], part_memory: PartMemory | None = None
    ) -> None:
        """``part_memory``: as of ``HostMemory``; every rank that shares it has the same values."""
        locked = any(tensor.is_cuda for tensor in tensors.values())
        super().__init__(tensors, locked=locked, part_memory=part_memory)
        if part_memory is None or part_memory.leads:
            for name, tensor in tensors.items():
                self.tensors[name].copy_(tensor, non_blocking=True)
        if self._locked:
            torch.cuda.synchronize()
        if part_memory is not None:
            part_memory.meet()


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes, with the gap behind it."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
