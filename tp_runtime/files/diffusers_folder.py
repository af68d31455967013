"""Presents a diffusers folder as one file with ComfyUI's names and layout.

A folder has ``config.json`` and ``diffusion_pytorch_model.safetensors``, or several such files and
an index that says which tensor is where. Whoever opens it says which rows of which ComfyUI tensor
a diffusers tensor makes up (``FileNames``, from the family's table); so nothing that reads model
files needs to know of folders.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError
from .safetensors_file import FormatError, SafetensorsFile, TensorInfo

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# In folders of a variant, its name stands before the last part: ….bf16.safetensors, ….bf16.json.
_VARIANTS = ("diffusion_pytorch_model.*.safetensors", f"{WEIGHTS}.index.*.json")


class Rows(Protocol):
    """Rows [start, stop) of a tensor of ComfyUI's file."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


@dataclass(frozen=True)
class FileNames:
    """How a folder's tensors lie in ComfyUI's file of the model, which ``label`` names.

    ``places``: diffusers' name → rows of the file. ``expected``: every tensor of the file, and its
    shape; what is a vector there may be a table in diffusers, row by row. ``swapped``: diffusers'
    names of tensors that have their halves the other way round. ``metadata``: what the file would
    have.
    """

    label: str
    places: Mapping[str, Rows]
    expected: Mapping[str, tuple[int, ...]]
    swapped: frozenset[str]
    metadata: Mapping[str, str] = field(default_factory=dict)


# From a folder and what its config.json says; raises CheckpointError.
NamesOf = Callable[[str, Mapping[str, Any]], FileNames]
# From the tensors of a file that was taken out of its folder; None: they have no diffusers names.
NamesAlone = Callable[[Mapping[str, TensorInfo]], FileNames | None]


@dataclass(frozen=True)
class _FolderRows:
    """Rows [start, stop) of a diffusers tensor. A ComfyUI tensor is several, one on another."""

    name: str
    start: int
    stop: int


class DiffusersFolder:
    """An open folder, with what ``SafetensorsFile`` has."""

    FORMAT = SafetensorsFile.FORMAT

    def __init__(self, path: str, names_of: NamesOf) -> None:
        """Raises CheckpointError, OSError."""
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._stacks: dict[str, list[_FolderRows]] = {}
        self._flat: set[str] = set()
        settings = self._read_config()
        with ExitStack() as stack:
            self._files = dict(self._open_files(stack))
            self._check_counts(settings)
            names = names_of(path, settings)
            self.metadata = dict(names.metadata)
            self._combine(names)
            self._open = stack.pop_all()

    @classmethod
    def of_file(cls, file: Any, names: FileNames) -> "DiffusersFolder":
        """A single file with diffusers' names, a ``SafetensorsFile`` that its opener closes.

        Raises CheckpointError.
        """
        self = cls.__new__(cls)
        self.path, self.metadata = file.path, file.metadata
        self.tensors, self._stacks, self._flat = {}, {}, set()
        self._files = dict.fromkeys(file.tensors, file)
        self._open = ExitStack()
        self._combine(names)
        return self

    def __enter__(self) -> "DiffusersFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that were read."""
        return sum(file.bytes_read for file in {id(f): f for f in self._files.values()}.values())

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A tensor, or ranges of its first and second axes; to be copied at once.

        Raises:
            FormatError: the tensor's dtype is not supported.
        """
        pieces = self._stacks[name]
        if not self.tensors[name].shape:
            return self._files[pieces[0].name].read(pieces[0].name)
        low, high = rows or (0, self.tensors[name].shape[0])
        if name in self._flat:
            return self._files[pieces[0].name].read(pieces[0].name).flatten()[low:high]
        found, base = [], 0
        for piece in pieces:
            length = piece.stop - piece.start
            first, last = max(low, base), min(high, base + length)
            if first < last:
                here = (piece.start + first - base, piece.start + last - base)
                found.append(self._files[piece.name].read(piece.name, here, columns))
            base += length
        return found[0] if len(found) == 1 else torch.cat(found)

    def _read_config(self) -> dict[str, Any]:
        if not (Path(self.path) / CONFIG).is_file():
            raise CheckpointError(
                f"The file {CONFIG} of the folder {self.path} does not exist. Choose a model file, "
                f"or a diffusers folder with {CONFIG} and {WEIGHTS}."
            )
        settings = self._read_json(CONFIG)
        if settings.get("quantization_config"):
            raise CheckpointError(
                f"The folder {self.path} is quantised ({settings['quantization_config']!r:.80}), "
                "which is only read from single files. Choose a bf16 or fp16 folder, or an fp8 or "
                "GGUF file of this model."
            )
        return settings

    def _check_counts(self, settings: Mapping[str, Any]) -> None:
        """Before anything is made of so many layers."""
        for name, value in settings.items():
            if name.endswith("layers") and isinstance(value, int) and value > len(self._files):
                raise CheckpointError(
                    f"{CONFIG} of the folder {self.path} says {name}={value}, but the folder has "
                    f"{len(self._files)} tensors in all. Download it again."
                )

    def _open_files(self, stack: ExitStack) -> Iterator[tuple[str, SafetensorsFile]]:
        """Every diffusers tensor, and the open file that it is in."""
        weights, index = self._weights_and_index()
        places = None
        if index is not None:
            places = self._read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
                raise CheckpointError(
                    f"{index} of the folder {self.path} does not say which tensor is in which file."
                    " Download it again."
                )
        names = sorted(set(places.values())) if places is not None else [weights]
        files = {name: stack.enter_context(self._open_file(name)) for name in names}
        if places is None:
            places = dict.fromkeys(files[weights].tensors, weights)
        for tensor, name in places.items():
            if tensor not in files[name].tensors:
                raise CheckpointError(
                    f"{index} of the folder {self.path} says that {tensor} is in {name}, but it is "
                    "not. Download the folder again."
                )
            yield tensor, files[name]

    def _weights_and_index(self) -> tuple[str, str | None]:
        """Names of the file with the weights, and of the index, where there is one."""
        folder = Path(self.path)
        if (folder / INDEX).is_file():
            return WEIGHTS, INDEX
        if (folder / WEIGHTS).is_file():
            return WEIGHTS, None
        files, indices = ([path.name for path in folder.glob(one)] for one in _VARIANTS)
        whole = [name for name in files if len(name.split(".")) == 3 and "-of-" not in name]
        if len(whole) + len(indices) == 1:
            return (whole[0], None) if whole else (WEIGHTS, indices[0])
        variants = f" Of its variants, keep one: {', '.join(whole + indices)}." if whole else ""
        raise CheckpointError(
            f"The folder {self.path} has neither {WEIGHTS} nor {INDEX}."
            f"{variants or ' Download it again.'}"
        )

    def _open_file(self, name: str) -> SafetensorsFile:
        path = Path(self.path) / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(
                f"The folder {self.path} lacks the file {name}. Download it again."
            )
        try:
            return SafetensorsFile(str(path))
        except FormatError as error:
            raise CheckpointError(
                f"The model file {path} is not a whole safetensors file: {error}. Download it "
                "again."
            ) from error

    def _read_json(self, name: str) -> dict[str, Any]:
        path = Path(self.path) / name
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no JSON: {error}. Download it again.") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no JSON object. Download it again.")
        return content

    def _combine(self, names: FileNames) -> None:
        """Say of every ComfyUI tensor which diffusers tensors it consists of."""
        unknown = [name for name in self._files if name not in names.places]
        if unknown:
            raise CheckpointError(
                f"The folder {self.path} has {len(unknown)} tensors that {names.label} has not, "
                f"such as {unknown[0]}. It is quantised with scales, or of a variant, and cannot "
                "be split yet. Choose a bf16 folder or a single file of this model."
            )
        stacks: dict[str, list[tuple[int, int, str]]] = {}
        for name in self._files:
            place = names.places[name]
            stacks.setdefault(place.name, []).append((place.start, place.stop, name))
        for name, stack in stacks.items():
            self._add(name, sorted(stack), names.expected[name], names.swapped)

    def _add(
        self,
        name: str,
        stack: list[tuple[int, int, str]],
        expected: tuple[int, ...],
        swapped: frozenset[str],
    ) -> None:
        infos = [self._files[part].tensors[part] for _, _, part in stack]
        if len(expected) == 1 and len(infos[0].shape) == 2 and infos[0].num_elements == expected[0]:
            self._flat.add(name)
            infos = [TensorInfo(expected, infos[0].dtype)]
        lengths = [info.shape[0] if info.shape else 0 for info in infos]
        if stack[0][:2] != (0, expected[0]):  # a real stack, of which a part may be missing
            self._check_stack(name, stack, lengths, infos, expected[0])
        self.tensors[name] = TensorInfo((sum(lengths), *infos[0].shape[1:]), infos[0].dtype)
        pieces = self._stacks[name] = []
        for (_, _, part), length in zip(stack, lengths, strict=True):
            cuts = [0, length]
            if part in swapped:
                cuts.insert(1, length // 2)
            ranges = list(pairwise(cuts))
            pieces += [_FolderRows(part, start, stop) for start, stop in reversed(ranges)]

    def _check_stack(
        self,
        name: str,
        stack: list[tuple[int, int, str]],
        lengths: list[int],
        infos: list[TensorInfo],
        total: int,
    ) -> None:
        present = ", ".join(part for _, _, part in stack)
        ends = [0] + [stop for _, stop, _ in stack]
        if [start for start, _, _ in stack] + [total] != ends:
            raise CheckpointError(
                f"The folder {self.path} lacks a tensor: of those that make up {name} it has only "
                f"{present}. Download it again."
            )
        if lengths != [stop - start for start, stop, _ in stack]:
            raise CheckpointError(
                f"The tensors {present} of the folder {self.path} have {lengths} rows, which is "
                f"not what {CONFIG} says. Download it again."
            )
        if len({(info.shape[1:], info.dtype) for info in infos}) > 1:
            raise CheckpointError(
                f"The tensors {present} of the folder {self.path} are of different dtypes or "
                "widths, but must be stacked. Choose a folder in one dtype."
            )
