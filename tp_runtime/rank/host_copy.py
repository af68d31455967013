"""A rank's tensors in the host's memory."""

from collections.abc import Mapping

import torch

_ALIGNMENT = 256


class HostMemory:
    """Tensors in one piece of host memory, without values; ``locked``: page-locked, for a GPU.

    One piece and not a tensor each, because torch rounds every page-locked tensor up to a power
    of two. Call ``close`` to give the memory back.
    """

    def __init__(self, like: Mapping[str, torch.Tensor], *, locked: bool) -> None:
        """``like``: shapes and dtypes, by name. They lie one behind another."""
        offsets, size = {}, 0
        for name, tensor in like.items():
            offsets[name] = size
            size += aligned(tensor.nbytes)
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
        """The bytes from one tensor's beginning to the end of that one, or of a later one."""
        base, end = self._memory.data_ptr(), self.tensors[last]
        start = self.tensors[first].data_ptr() - base
        return self._memory[start : end.data_ptr() - base + end.nbytes]

    def close(self) -> None:
        """Give the memory back; the tensors must not be used any more."""
        if self._locked:
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
            self._locked = False
        self.tensors.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)


class HostCopy(HostMemory):
    """Copies of tensors; page-locked if they come from a GPU."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__(tensors, locked=any(tensor.is_cuda for tensor in tensors.values()))
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor, non_blocking=True)
        if self._locked:
            torch.cuda.synchronize()


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes, with the gap behind it."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
