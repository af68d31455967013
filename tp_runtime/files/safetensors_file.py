"""Reads safetensors files: the header, and slices of tensors straight from the page cache.

Not through the ``safetensors`` package, because that maps a file privately and copy-on-write:
Linux then wants as much free memory as the file is large, which a 40 GB model on a machine with
32 GB does not have, and several ranks at once even less. The format is eight bytes of length, a
JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format).
"""

import json
import math
import mmap
import os
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import torch

# What the format allows. Headers of models have less than 1 MB, but some tools write whole
# workflows and pictures into the metadata, or leave room for that. As lists of numbers, so much
# JSON would take 25 times as much memory.
MAX_HEADER_BYTES = 100_000_000
MAX_AXES = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FormatError(Exception):
    """A file is not a whole one of its format; the text says why."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and safetensors dtype name (``"BF16"``) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class SafetensorsFile:
    """An open file: a context manager. Nothing but the header is read before ``read``.

    ``tensors`` and ``metadata`` are the header's content; ``bytes_read`` counts the tensor data
    that ``read`` has returned.
    """

    FORMAT = "safetensors"

    def __init__(self, path: str) -> None:
        """Raises OSError, FormatError."""
        self.path = path
        self.bytes_read = 0
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, tuple[int, int]] = {}
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._read_header(file.read(8), file, size)
            # Read-only and shared: costs no memory beyond the page cache.
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_: object) -> None:
        del self._map  # the pages go with the last tensor that views them

    def _read_header(self, prefix: bytes, file: Any, size: int) -> None:
        if len(prefix) < 8:
            raise FormatError(f"it has {size} bytes, fewer than the length of a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise FormatError(
                f"its header would have {length} bytes; the file has {size}, and a header at most "
                f"{MAX_HEADER_BYTES}"
            )
        try:
            header = json.loads(file.read(length))
            self.metadata = dict(header.pop("__metadata__", None) or {})
            for name, entry in header.items():
                self._add(name, entry, 8 + length, size)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"its header is malformed ({type(error).__name__}: {error})"
            ) from error

    def _add(self, name: str, entry: dict[str, Any], base: int, size: int) -> None:
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        info = TensorInfo(shape, str(entry["dtype"]))
        if len(shape) > MAX_AXES:
            raise ValueError(f"{name!r} has {len(shape)} axes; at most {MAX_AXES} are read")
        if not all(isinstance(n, int) and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ValueError(f"{name!r} has a size that is no number, or none of this world")
        dtype = DTYPES.get(info.dtype)
        if dtype is not None and stop - start != info.num_elements * dtype.itemsize:
            raise ValueError(f"{name!r} of shape {list(shape)} has {stop - start} bytes")
        if stop < start or base + stop > size:
            raise FormatError(f"it is cut short: {name!r} ends at byte {base + stop} of {size}")
        self.tensors[name] = info
        self._places[name] = (base + start, stop - start)

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A tensor, or ranges of its first and second axes, on the CPU.

        The result views the file: copy it before the file is closed, and never write to it.

        Raises:
            FormatError: the tensor's dtype is not supported.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise FormatError(f"{name!r} has the unsupported dtype {info.dtype}")
        dtype = DTYPES[info.dtype]
        offset, length = self._places[name]
        if length == 0:
            return torch.empty(info.shape, dtype=dtype)
        with warnings.catch_warnings():
            # torch has no read-only tensors, and warns that this one should be one.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            data = torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=offset)
        if offset % dtype.itemsize:
            data = data.clone()  # the format does not promise alignment
        tensor = data.view(dtype).view(info.shape)
        if rows is not None:
            tensor = tensor[slice(*rows)]
        if columns is not None:
            tensor = tensor[:, slice(*columns)]
        self.bytes_read += tensor.nbytes
        return tensor
