"""Copies of a rank's tensors in the host's memory."""

from collections.abc import Mapping

import torch

_ALIGNMENT = 256


class HostCopy:
    """Copies of tensors in one piece of host memory; page-locked if they come from a GPU.

    One piece and not a tensor each, because torch rounds every page-locked tensor up to a power
    of two. Call ``close`` to give the memory back.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        offsets, size = {}, 0
        for name, tensor in tensors.items():
            offsets[name] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.empty(size, dtype=torch.uint8)
        self._locked = size > 0 and any(tensor.is_cuda for tensor in tensors.values())
        if self._locked:
            address = self._memory.data_ptr()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        self.tensors: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            piece = self._memory[offsets[name] : offsets[name] + tensor.nbytes]
            copy = piece.view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor, non_blocking=True)
            self.tensors[name] = copy
        if self._locked:
            torch.cuda.synchronize()

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the copies take."""
        return self._memory.nbytes

    def close(self) -> None:
        """Give the memory back; the copies must not be used any more."""
        if self._locked:
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
            self._locked = False
        self.tensors.clear()
        self._memory = torch.empty(0, dtype=torch.uint8)
