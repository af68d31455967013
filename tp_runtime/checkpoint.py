"""Reads model files: what is in them (both halves), and slices of their tensors (rank half).

Only safetensors files; nothing is ever unpickled. Names are ComfyUI's, with the prefix that full
checkpoints carry taken off.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SHOWN_NAMES = 5


@dataclass(frozen=True)
class TensorInfo:
    """Shape and safetensors dtype name (``"BF16"``) of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class CheckpointFile:
    """An open safetensors file. Counts the bytes of tensor data that are read through it."""

    def __init__(self, path: str, handle: Any) -> None:
        self.path = path
        self.bytes_read = 0
        self._handle = handle
        names = list(handle.keys())
        prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in names)), "")
        self._stored = {n[len(prefix) :]: n for n in names if n.startswith(prefix)}
        self.metadata: dict[str, str] = handle.metadata() or {}

    @classmethod
    @contextmanager
    def open(cls, path: str) -> Iterator["CheckpointFile"]:
        """Raises CheckpointError if the file is missing, cut short or no safetensors file."""
        if not Path(path).is_file():
            raise CheckpointError(f"The model file {path} does not exist. Choose another file.")
        try:
            with safe_open(path, framework="pt") as handle:
                yield cls(path, handle)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"The model file {path} cannot be read as safetensors ({error}). It may be cut "
                "short: download it again."
            ) from error

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's shape and dtype, from the header alone."""
        infos = {}
        for name, stored in self._stored.items():
            part = self._handle.get_slice(stored)
            infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype())
        return infos

    def read(
        self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None
    ) -> torch.Tensor:
        """A tensor, or the given range of its first and second axes, on the CPU."""
        if rows is None:
            tensor = self._handle.get_tensor(self._stored[name])
        elif columns is None:
            tensor = self._handle.get_slice(self._stored[name])[slice(*rows)]
        else:
            tensor = self._handle.get_slice(self._stored[name])[slice(*rows), slice(*columns)]
        self.bytes_read += tensor.nbytes
        return tensor


@dataclass(frozen=True)
class CheckpointInfo:
    """What a model file is, from its header. ``config`` has the fields of the family's module."""

    path: str
    family: str
    label: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)

    @property
    def num_parameters(self) -> int:
        return sum(info.num_elements for info in self.tensors.values())

    def check_tp_size(self, tp_size: int) -> None:
        """Raises SizeError if the model cannot be split over ``tp_size`` ranks."""
        from .models import family

        family(self.family).plan(self.config).check_tp_size(tp_size, self.label)

    def valid_tp_sizes(self, limit: int = 8) -> tuple[int, ...]:
        """The sizes up to ``limit`` that ``check_tp_size`` accepts."""
        from .models import family

        return family(self.family).plan(self.config).valid_tp_sizes(limit)


def inspect_checkpoint(path: str) -> CheckpointInfo:
    """Recognise a model file and check that it is whole, from its header alone.

    Raises:
        CheckpointError: the file is missing, damaged, of an unknown architecture, lacks tensors,
            has tensors that the architecture has not, or has them in other shapes.
    """
    from .models import FAMILIES

    with CheckpointFile.open(path) as file:
        tensors = file.tensors()
        metadata = file.metadata
    for module in FAMILIES.values():
        if module.recognises(tensors):
            break
    else:
        known = ", ".join(module.LABEL for module in FAMILIES.values())
        raise CheckpointError(
            f"The model file {path} is of an architecture that cannot be split yet (first "
            f"tensors: {_some(sorted(tensors))}). Supported: {known}. Load it with the stock "
            "'Load Diffusion Model' node instead."
        )
    try:
        config = module.infer_config(tensors)
    except KeyError as error:
        raise CheckpointError(
            f"The {module.LABEL} file {path} lacks the tensor {error}. Download it again."
        ) from error
    _check_tensors(path, module.LABEL, tensors, module.file_tensors(config), module.UNUSED)
    return CheckpointInfo(path, module.FAMILY, module.LABEL, config, tensors, metadata)


def _check_tensors(
    path: str,
    label: str,
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    unused: frozenset[str],
) -> None:
    problems = []
    missing = sorted(set(expected) - set(found))
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    leftover = sorted(set(found) - set(expected) - unused)
    if leftover:
        problems.append(f"{len(leftover)} unknown ({_some(leftover)})")
    wrong = [
        f"{name} is {list(found[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({_some(wrong)})")
    if problems:
        raise CheckpointError(
            f"The {label} file {path} does not have the tensors of its architecture: "
            f"{'; '.join(problems)}. Download it again, or load it with the stock node."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown}, …"
