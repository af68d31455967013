"""A CUDA stream that waits for a number in the host's memory, or writes one, when it gets there.

``cuStreamWaitValue32`` and ``cuStreamWriteValue32`` of the CUDA driver (CUDA Driver API, "Stream
Memory Operations"), which torch does not offer. A CUDA graph can record them. A wait costs the GPU
nothing: on an H200, kernels of another process took 44.9 ms beside a stream that waits, and 44.8
without one. (Not so beside two that wait, one of them with work to do then: `client/evaluated.py`.)
"""

import ctypes
import functools
import logging

import torch

logger = logging.getLogger("tp_runtime")

GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ: by the difference, so numbers may wrap around
EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ


class StreamWaitError(Exception):
    """The CUDA driver refused it: "not supported" on some systems (WSL)."""


def until(
    device: torch.device, address: int, value: int, condition: int = GREATER_OR_EQUAL
) -> None:
    """Have the device's current stream wait until the 32 bits at ``address`` are ``value`` or more.

    ``address``: in page-locked memory of the host (``cudaHostRegister``). ``condition``: or
    ``EQUAL``.

    Raises:
        StreamWaitError
    """
    _queue("cuStreamWaitValue32_v2", device, address, value, condition)


def write(device: torch.device, address: int, value: int) -> None:
    """Have the device's current stream write there, after all that it wrote before.

    Raises:
        StreamWaitError
    """
    _queue("cuStreamWriteValue32_v2", device, address, value, 0)


def current(device: torch.device) -> torch.cuda.Stream:
    """The stream that the others mean."""
    return torch.cuda.current_stream(device)


def mark(device: torch.device) -> torch.cuda.Event:
    """Says when the device's current stream has got here; two of them, how long it took between."""
    return current(device).record_event(torch.cuda.Event(enable_timing=True))


def _queue(operation: str, device: torch.device, address: int, value: int, flags: int) -> None:
    driver = _driver()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        seen_by_device = ctypes.c_uint64()
        result = driver.cuMemHostGetDevicePointer_v2(
            ctypes.byref(seen_by_device), ctypes.c_void_p(address), ctypes.c_uint(0)
        )
        result = result or getattr(driver, operation)(
            ctypes.c_void_p(stream),
            seen_by_device,
            ctypes.c_uint32(value % 2**32),
            ctypes.c_uint(flags),
        )
    if result:
        raise StreamWaitError(f"{operation}: error {result} of the CUDA driver")


@functools.cache
def is_possible(device: torch.device) -> bool:
    """Whether the device's streams can wait so. Tried once, with a wait for what is so already."""
    there = torch.ones(1, dtype=torch.int32).pin_memory()
    try:
        until(device, there.data_ptr(), 1)
        torch.cuda.current_stream(device).synchronize()
    except StreamWaitError as error:
        logger.warning("the streams of %s cannot wait for numbers in memory: %s", device, error)
        return False
    return True


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise StreamWaitError(str(error)) from error
