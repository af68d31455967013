"""Tensors between ComfyUI's process and the ranks: one anonymous shared memory per group.

The memory is a ``memfd`` that the ranks inherit as a file descriptor. It has no name, so no other
process can open it, nothing can be left over in ``/dev/shm``, and a container's small ``/dev/shm``
does not limit it. ``Exchange`` is one process's view of it.
"""

import contextlib
import ctypes
import mmap
import os

import torch

from .. import machine, reasons
from ..errors import InputError, ProtocolError, TPRuntimeError
from . import stream_wait
from .protocol import TensorRef

ALIGNMENT = 256
HEADER_BYTES = ALIGNMENT  # at the beginning, before any tensor: numbers of requests, 32 bits each
_INPUTS_AT = 128  # of ``say_inputs``; those of ``say_given`` are before it
MAX_VIEWS = 64

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``. Raises InputError for a dtype that cannot travel."""
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise InputError(f"A tensor of dtype {name} cannot be sent; use one of {sorted(_DTYPES)}.")
    return name


def dtype_of(name: str) -> torch.dtype:
    """``torch.bfloat16`` for ``"bfloat16"``. Raises ProtocolError for an unknown name."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ProtocolError(f"Unknown dtype {name!r}.") from None


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * dtype.itemsize


def num_bytes(ref: TensorRef) -> int:
    """How many bytes the tensor has."""
    return _num_bytes(ref.shape, dtype_of(ref.dtype))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


# torch copies and compares a megabyte on the CPU with all cores, which have fallen asleep between
# two evaluations; for so little, one core that is awake is enough.
memcmp = ctypes.CDLL(None).memcmp
memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes lie in this process's memory in order."""
    return tensor.is_cpu and tensor.is_contiguous()


def _lacking(size: int, reason: str) -> TPRuntimeError:
    return TPRuntimeError(
        f"{size} bytes of shared memory are not to be had ({reason}). "
        "Free some RAM, give the container more, or use a smaller batch."
    )


class Exchange:
    """One process's mapping of a group's shared memory. Call ``close`` when done with it.

    Only the engine allocates; the ranks map what a message's ``exchange_bytes`` tells them.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None
        self._size = 0
        self._page_locked = False
        self._written: list[tuple[int, int]] = []
        # Of the last copy from here to a GPU, by the stream that makes it.
        self._reading: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._writing: set[torch.cuda.Stream] = set()  # in which GPUs copy to here
        self._views: dict[TensorRef, torch.Tensor] = {}  # each evaluation has the same
        self._awaited: dict[int, int] = {}  # by ``await_given``: batch group → request

    @classmethod
    def create(cls) -> "Exchange":
        """A new, empty memory, which this process owns. Raises TPRuntimeError."""
        try:
            return cls(os.memfd_create("tp-runtime-exchange", os.MFD_CLOEXEC))
        except OSError as error:
            raise TPRuntimeError(
                f"There is no shared memory for a process group: {reasons.of(error)}"
            ) from error

    @property
    def size(self) -> int:
        """Bytes mapped now."""
        return self._size

    @property
    def address(self) -> int:
        """Where the memory is mapped in this process. It must be."""
        assert self._map is not None, "nothing is mapped"
        return torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()

    def reserve(self, size: int) -> None:
        """Make the memory at least ``size`` bytes. Raises TPRuntimeError if the system has none."""
        if size <= self._size:
            return
        size = max(_aligned(size), 2 * self._size)
        # The system itself has no bound here: it would hand out memory until it kills a process.
        if size - self._size > machine.memory().available:
            raise _lacking(size, "fewer than that are free here, on the host or in its container")
        try:
            # Without this, a lack of memory would be a SIGBUS at the first write.
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            raise _lacking(size, error.strerror or str(error)) from error
        self.remap(size)

    def remap(self, size: int) -> None:
        """Map the first ``size`` bytes, if not mapped already. Earlier views become invalid.

        In a process that uses CUDA they are page-locked: GPUs read and write them directly.
        """
        if size == self._size:
            return
        if size > os.fstat(self.fd).st_size:
            raise ProtocolError(f"{size} bytes of exchange memory named, fewer exist.")
        self._unmap()
        self._map = mmap.mmap(self.fd, size)
        self._size = size
        if size and torch.cuda.is_initialized():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self.address, size, 0))
            self._page_locked = True

    def view(self, ref: TensorRef) -> torch.Tensor:
        """The tensor that ``ref`` describes, in place. Valid until the next call rewrites it."""
        if ref not in self._views:
            if len(self._views) == MAX_VIEWS:
                self._views.clear()
            with torch.inference_mode(False):  # a view serves both modes
                self._views[ref] = self._new_view(ref)
        return self._views[ref]

    def _new_view(self, ref: TensorRef) -> torch.Tensor:
        dtype = dtype_of(ref.dtype)
        length = _num_bytes(ref.shape, dtype)
        if length == 0:
            return torch.empty(ref.shape, dtype=dtype)
        if self._map is None or ref.offset < 0 or ref.offset + length > self._size:
            raise ProtocolError(
                f"A tensor of {length} bytes at {ref.offset} is outside the {self._size} bytes "
                "of exchange memory."
            )
        data = torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=ref.offset)
        return data.view(dtype).view(ref.shape)

    def write(self, ref: TensorRef, tensor: torch.Tensor) -> None:
        """Copy a tensor, from any device, to where ``ref`` says. From a GPU: only begin to."""
        target = self.view(ref)
        if is_plain(tensor):
            ctypes.memmove(target.data_ptr(), tensor.data_ptr(), target.nbytes)
        else:
            target.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            if tensor.is_cuda:
                self._writing.add(torch.cuda.current_stream(tensor.device))
        self._written.append((ref.offset, target.nbytes))

    def copied_to(self, device: torch.device, view: torch.Tensor) -> torch.Tensor:
        """A copy on a device of a tensor that lies here. To a GPU: only begun, in its stream."""
        copy = torch.empty_like(view, device=device)
        if device.type == "cpu":
            ctypes.memmove(copy.data_ptr(), view.data_ptr(), view.nbytes)
        else:
            self.copy_to(copy, view)
        return copy

    def copy_to(self, target: torch.Tensor, view: torch.Tensor) -> None:
        """Copy a tensor that lies here to another device. To a GPU: only begin, in its stream."""
        target.copy_(view, non_blocking=target.is_cuda)
        if target.is_cuda:
            stream = torch.cuda.current_stream(target.device)
            self._reading[stream] = stream.record_event()

    # --- in stream order -------------------------------------------------------------------------

    def say_inputs(self, device: torch.device, request: int) -> None:
        """Have the device's current stream say that the request's tensors are here, when they are.

        Raises:
            StreamWaitError: the device's streams cannot write so.
        """
        stream_wait.write(device, self.address + _INPUTS_AT, request)

    def await_inputs(self, device: torch.device, request: int) -> None:
        """Have the device's current stream wait until ``say_inputs`` has been done so.

        Raises:
            StreamWaitError: the device's streams cannot wait so.
        """
        stream_wait.until(device, self.address + _INPUTS_AT, request)

    def say_given(self, batch_group: int, request: int) -> None:
        """The results of a batch group for that request lie here now, or never will."""
        self._given(batch_group).value = request

    def say_given_later(self, device: torch.device, batch_group: int, request: int) -> None:
        """Have the device's current stream do that, when it gets there.

        Raises:
            StreamWaitError: the device's streams cannot write so.
        """
        stream_wait.write(device, ctypes.addressof(self._given(batch_group)), request)

    def await_given(self, device: torch.device, batch_group: int, request: int) -> None:
        """Have the device's current stream wait until ``say_given`` has been called so.

        What is put into the stream afterwards finds the results here, and this thread goes on.

        Raises:
            StreamWaitError: the device's streams cannot wait so.
        """
        self._awaited[batch_group] = request
        stream_wait.until(device, ctypes.addressof(self._given(batch_group)), request)

    def release(self) -> None:
        """Let streams that wait for results go on without them. From any thread.

        As often as it is called: a rank that answers an earlier request takes the number back.
        """
        mapped = self._map  # is not unmapped meanwhile, whatever another thread does
        if mapped is None:
            return
        first = torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr()
        for batch_group, request in list(self._awaited.items()):
            ctypes.c_uint32.from_address(first + 4 * batch_group).value = request

    def _given(self, batch_group: int) -> ctypes.c_uint32:
        assert self._map is not None, "nothing is mapped"
        return ctypes.c_uint32.from_address(self.address + 4 * batch_group)

    def wait(self) -> None:
        """Return when all copies that were begun, to here and from here, have been made."""
        for event in self._reading.values():
            event.synchronize()
        for stream in self._writing:
            stream.synchronize()
        self._reading.clear()
        self._writing.clear()

    def take_written(self) -> list[tuple[int, memoryview]]:
        """What was written since the last call: offset and bytes, in place."""
        written, self._written = self._written, []
        return [
            (offset, memoryview(self._map)[offset : offset + size])
            for offset, size in written
            if size and self._map is not None
        ]

    def put(self, offset: int, data: memoryview) -> None:
        """Copy bytes of another side's memory to the same place here. Raises ProtocolError."""
        if self._map is None or not 0 <= offset <= self._size - len(data):
            raise ProtocolError(
                f"{len(data)} bytes for {offset} of the {self._size} bytes of exchange memory."
            )
        memoryview(self._map)[offset : offset + len(data)] = data

    def _unmap(self) -> None:
        self._views.clear()
        self.release()
        # This and giving the lock back fail only where the GPU's context is lost, and both with it.
        with contextlib.suppress(RuntimeError):
            self.wait()
        if self._page_locked:
            torch.cuda.cudart().cudaHostUnregister(self.address)
            self._page_locked = False
        if self._map is not None:
            # Views of torch.frombuffer may still be alive; the pages go with the last of them.
            self._map = None
            self._size = 0

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        self._unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class TensorPlaces:
    """Places for the tensors of one request in the exchange memory, one after the other."""

    def __init__(self) -> None:
        self.size = HEADER_BYTES
        self._placed: list[tuple[TensorRef, torch.Tensor]] = []
        # By identity, which the tensor itself keeps from being given again.
        self._known: dict[tuple[int, int], tuple[TensorRef, torch.Tensor]] = {}

    def place(self, tensor: torch.Tensor, key: int = 0) -> TensorRef:
        """Reserve room for ``tensor``; it is copied by ``write_to``.

        The same tensor has one place: a ControlNet may give it to many blocks.
        """
        known = self._known.get((id(tensor), key))
        if known is not None:
            return known[0]
        shape = tuple(tensor.shape)
        ref = TensorRef(shape, dtype_name(tensor.dtype), self.size, key)
        self.size = _aligned(self.size + _num_bytes(shape, tensor.dtype))
        self._placed.append((ref, tensor))
        self._known[id(tensor), key] = ref, tensor
        return ref

    def reserve(self, size: int) -> int:
        """Room for ``size`` bytes that a rank will write; returns its offset."""
        offset = self.size
        self.size = _aligned(self.size + size)
        return offset

    def write_to(self, exchange: Exchange) -> None:
        """Grow ``exchange`` as needed and begin to copy what was placed since the last time."""
        exchange.reserve(self.size)
        for ref, tensor in self._placed:
            exchange.write(ref, tensor)
        self._placed.clear()
