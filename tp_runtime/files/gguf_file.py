"""Reads GGUF files: the header, and slices of tensors, dequantised block by block.

Needs the optional package ``gguf``, which reads the header and knows the block formats. Names and
shapes are those of the converters for ComfyUI: axes in reverse order, as everywhere in GGUF, and
``comfy.gguf.orig_shape.NAME`` for a tensor whose rows no block would fit. They keep ``config``, the
settings of a model in the metadata of its safetensors file, as a text.
"""

import functools
import math
import struct
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import torch

from ..errors import CheckpointError
from .safetensors_file import DTYPES, FormatError, TensorInfo

_FLOATS = {
    gguf.GGMLQuantizationType.F32: "F32",
    gguf.GGMLQuantizationType.F16: "F16",
    gguf.GGMLQuantizationType.BF16: "BF16",
}
_LONG_LIST = 16  # no shape is longer
_MAX_WORDS = 2**22  # in a list
_MAX_ITEMS = 2**16  # fields, elements of their lists, and tensors
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_CONFIG = "config"


class GGUFFile:
    """An open file, with what ``SafetensorsFile`` has; quantised tensors are read as F32."""

    FORMAT = "GGUF"

    def __init__(self, path: str, axes: Mapping[str, int] | None = None) -> None:
        """``axes``: of tensors that begin with axes of length one, which ggml drops: how many.

        Raises:
            CheckpointError, OSError, FormatError.
        """
        self.path = path
        self.bytes_read = 0
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, gguf.ReaderTensor] = {}
        try:
            reader = _CheckedReader(path)
            self.metadata = _metadata(reader)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise FormatError(str(error)) from error
        if reader.byte_order == "S":
            raise FormatError("it is of the other byte order than this machine")
        self._check_types(reader)
        for tensor in reader.tensors:
            dtype = _FLOATS.get(tensor.tensor_type, "F32")
            self.tensors[tensor.name] = TensorInfo(_shape(reader, tensor, axes or {}), dtype)
            self._stored[tensor.name] = tensor

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.clear()  # the pages go with the last tensor that views them

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A tensor, or ranges of its first and second axes, on the CPU; to be copied at once.

        Only the blocks that hold a part of the ranges are read.
        """
        shape, tensor = self.tensors[name].shape, self._stored[name]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        blocks = tensor.data.reshape(-1).view(np.uint8).reshape(-1, block_bytes)
        low, high = rows or (0, shape[0])
        width = math.prod(shape[1:])
        if width % block_size == 0:
            blocks = blocks.reshape(shape[0], width // block_size, block_bytes)[low:high]
            start, stop = columns or (0, width)
            values = self._cut(tensor.tensor_type, blocks, start, stop)
            return values if columns is not None else values.reshape(high - low, *shape[1:])
        # Blocks reach over the ends of rows.
        values = self._cut(tensor.tensor_type, blocks[None], low * width, high * width)
        values = values.reshape(high - low, *shape[1:])
        return values if columns is None else values[:, slice(*columns)]

    def _cut(
        self, kind: gguf.GGMLQuantizationType, blocks: Any, start: int, stop: int
    ) -> torch.Tensor:
        """Elements [start, stop) of each row of blocks (R, N, bytes of a block)."""
        block_size = gguf.GGML_QUANT_SIZES[kind][0]
        first = start // block_size
        blocks = np.ascontiguousarray(blocks[:, first : -(-stop // block_size)])
        self.bytes_read += blocks.nbytes
        data = blocks.reshape(len(blocks), -1)
        if kind in _FLOATS:
            with warnings.catch_warnings():
                # torch has no read-only tensors, and warns that this one should be one.
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                values = torch.from_numpy(data).view(DTYPES[_FLOATS[kind]])
        else:
            values = torch.from_numpy(gguf.dequantize(data, kind))
        return values[:, start - first * block_size : stop - first * block_size]

    def _check_types(self, reader: gguf.GGUFReader) -> None:
        strange = {t.tensor_type: t.name for t in reader.tensors if not _is_readable(t.tensor_type)}
        if strange:
            found = ", ".join(f"{name} as {kind.name}" for kind, name in strange.items())
            readable = [kind.name for kind in gguf.GGMLQuantizationType if _is_readable(kind)]
            raise CheckpointError(
                f"The model file {self.path} is quantised in a way that cannot be read: {found}. "
                f"Supported: {', '.join(readable)}. Choose another file of this model."
            )


class _CheckedReader(gguf.GGUFReader):
    """A reader that stops where a file ends: gguf's own would go on with nothing.

    And that takes no time and memory for what is of no use here, such as a text encoder's words:
    gguf's own makes an array of each.
    """

    _num_items = 0

    def _build_fields(self, offs: int, count: Any) -> int:
        return int(super()._build_fields(offs, self._checked(count)))

    def _build_tensor_info(self, offs: int, count: Any) -> Any:
        return super()._build_tensor_info(offs, self._checked(count))

    def _checked(self, count: Any) -> Any:
        self._num_items += int(count)
        if self._num_items > _MAX_ITEMS:
            raise FormatError(f"it is cut short, or no model: {self._num_items} things are listed")
        return count

    def _get_field_parts(self, orig_offs: int, raw_type: Any) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, length = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            if kind[0] == gguf.GGUFValueType.ARRAY:
                raise FormatError("its header has a list of lists")
            if length[0] > _LONG_LIST:
                size = 12 + self._size_of_items(orig_offs + 12, kind[0], int(length[0]))
                return size, [kind, length], [], [gguf.GGUFValueType.ARRAY]
            self._checked(length[0])
        return super()._get_field_parts(orig_offs, raw_type)

    def _size_of_items(self, offs: int, kind: int, length: int) -> int:
        """The bytes that a list takes. Raises FormatError."""
        dtype = self.gguf_scalar_to_np.get(gguf.GGUFValueType(kind))
        if dtype is not None:
            return int(self._get(offs, dtype, length).nbytes)
        if length > _MAX_WORDS:
            raise FormatError(f"its header has a list of {length} texts, more than {_MAX_WORDS}")
        end, order = offs, ">" if (self.byte_order == "S") is (sys.byteorder == "little") else "<"
        data: Any = memoryview(self.data)  # type: ignore[arg-type]  # numpy's stubs, on 3.11
        for _ in range(length):
            try:
                (num_bytes,) = struct.unpack_from(f"{order}Q", data, end)
            except struct.error as error:
                raise FormatError(f"it is cut short ({error})") from error
            end += 8 + num_bytes
        return end - offs

    def _get(self, offset: int, dtype: Any, count: Any = 1, *args: Any, **kwargs: Any) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise FormatError(f"it is cut short: it would have {end} bytes, not {len(self.data)}")
        return super()._get(offset, dtype, count, *args, **kwargs)


@functools.cache
def _is_readable(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _metadata(reader: gguf.GGUFReader) -> dict[str, str]:
    """Of the file's fields, what its model's settings are read from. Raises ValueError."""
    field = reader.get_field(_CONFIG)
    if field is None or field.types != [gguf.GGUFValueType.STRING]:
        return {}
    return {_CONFIG: str(field.contents())}


def _shape(
    reader: gguf.GGUFReader, tensor: gguf.ReaderTensor, axes: Mapping[str, int]
) -> tuple[int, ...]:
    """The tensor's shape in torch. Raises FormatError."""
    shape = tuple(reversed(tensor.shape.tolist()))
    field = reader.get_field(f"{_ORIGINAL_SHAPE}{tensor.name}")
    if field is not None:
        original = field.contents()
        if not isinstance(original, list) or not all(isinstance(n, int) for n in original):
            raise FormatError(f"the original shape of {tensor.name!r} is {original!r}")
        if min(original, default=0) <= 0 or math.prod(original) != tensor.n_elements:
            raise FormatError(f"{tensor.name!r} of shape {list(shape)} cannot be {original}")
        shape = tuple(original)
    count = next((count for name, count in axes.items() if tensor.name.endswith(name)), 0)
    return (1,) * (count - len(shape)) + shape
