"""Remembers which constant tensors the ranks hold already, so that each crosses once.

Conditioning then crosses once per generation and not once per evaluation.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from ..wire.exchange import is_plain, memcmp

HELD_BYTES = 512 * 2**20


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same content, and shape, dtype and device; GPUs are waited for.

    What lies in order in the host's memory is compared byte by byte, by one core, which is awake.
    """
    return _comparable(one, other) and _equal(one, other)


def _comparable(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, which are comparable, have the same content."""
    if is_plain(one) and is_plain(other):
        return memcmp(one.data_ptr(), other.data_ptr(), one.nbytes) == 0
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or its bytes where a GPU cannot compare its numbers: those of fp8."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


class HeldTensors:
    """Which constant tensors the ranks hold, compared by content, least recently used first out.

    Samplers build new tensor objects for the same conditioning at every step (``torch.cat``,
    ``.to``), so identity does not tell; comparing the content is exact and cheaper than hashing.

    What ``add`` and ``evict`` change is known to the ranks only once a request has told them:
    ``commit`` after sending it, or ``roll_back`` if it was not sent.
    """

    def __init__(self, limit_bytes: int = HELD_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._held: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._bytes = 0
        self._next_key = 1
        self._first_unsent = 1
        self._to_drop: list[int] = []

    def find(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        """For each tensor, the key under which the ranks hold an equal one, or 0.

        On a GPU every comparison is waited for. Requests are alike, so the tensors of the last one
        are tried in the order in which they came, each for one.
        """
        keys = list(reversed(self._held))
        found = []
        for tensor in tensors:
            key = next((key for key in keys if are_equal(self._held[key], tensor)), 0)
            if key:
                keys.remove(key)
                keys.append(key)
            found.append(key)
        for key in filter(None, reversed(found)):
            self._held.move_to_end(key)
        return found

    def may_be(
        self, keys: Sequence[int], tensors: Sequence[torch.Tensor], device: torch.device
    ) -> bool:
        """Whether the ranks still hold these, and the tensors may be equal to them.

        As far as it can be told without waiting for the device: by shapes, and by the content of
        those on the CPU. Not if one is on another device, or the ranks are to drop something.
        """
        if self._to_drop or len(keys) != len(tensors) or not self._held.keys() >= {*keys}:
            return False
        pairs = list(zip(map(self._held.__getitem__, keys), tensors, strict=True))
        return all(
            _comparable(*pair) and (_equal(*pair) if pair[0].is_cpu else pair[0].device == device)
            for pair in pairs
        )

    def begin_to_compare(
        self, keys: Sequence[int], tensors: Sequence[torch.Tensor]
    ) -> Callable[[], bool]:
        """What ``may_be`` has left: the content of those on a GPU, in its current stream.

        Returns what waits for it, and says whether all are equal.
        """
        for key in keys:
            self._held.move_to_end(key)
        pairs = [(self._held[key], one) for key, one in zip(keys, tensors, strict=True)]
        differences = [torch.ne(*map(_bits, pair)).any() for pair in pairs if pair[1].is_cuda]
        if not differences:
            return lambda: True
        found = torch.empty((), dtype=torch.bool, pin_memory=True)
        found.copy_(torch.stack(differences).any(), non_blocking=True)
        compared = torch.cuda.current_stream(differences[0].device).record_event()

        def are_equal() -> bool:
            compared.synchronize()
            return not found.item()

        return are_equal

    def add(self, tensor: torch.Tensor) -> int:
        """Remember ``tensor`` (a copy of it) under a new key, which is returned."""
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        key = self._next_key
        self._next_key += 1
        self._held[key] = copy
        self._bytes += copy.nbytes
        return key

    def evict(self, in_use: set[int]) -> list[int]:
        """Forget the oldest tensors beyond the limit, except those in use.

        Returns the keys that the ranks are to drop with the next request.
        """
        for key in list(self._held):
            if self._bytes <= self._limit_bytes:
                break
            if key not in in_use:
                self._forget(key)
                self._to_drop.append(key)
        return list(self._to_drop)

    def commit(self) -> None:
        """The ranks have been told everything."""
        self._first_unsent = self._next_key
        self._to_drop.clear()

    def roll_back(self) -> None:
        """The request was not sent: the ranks have none of its tensors and dropped nothing."""
        for key in [key for key in self._held if key >= self._first_unsent]:
            self._forget(key)

    def clear(self) -> None:
        """The ranks have dropped all that they were told."""
        self._held.clear()
        self._bytes = 0
        self.commit()

    def _forget(self, key: int) -> None:
        self._bytes -= self._held.pop(key).nbytes
