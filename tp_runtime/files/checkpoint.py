"""Reads model files: what is in them, and slices of their tensors.

Safetensors files, GGUF files and diffusers folders; nothing is ever unpickled. Names are ComfyUI's,
with the prefix that full checkpoints carry taken off.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError
from .diffusers_folder import DiffusersFolder, NamesOf
from .safetensors_file import FormatError, SafetensorsFile, TensorInfo

if TYPE_CHECKING:
    from .gguf_file import GGUFFile

# What people call the files that can be read.
FORMATS = ("bf16", "fp16", "fp32", "fp8, plain and scaled", "GGUF", "diffusers folder")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


class CheckpointFile:
    """A model file that is open for reading, by ComfyUI's names of its tensors."""

    def __init__(self, file: "SafetensorsFile | DiffusersFolder | GGUFFile") -> None:
        self._file = file
        names = list(file.tensors)
        prefix = next((p for p in PREFIXES if any(n.startswith(p) for n in names)), "")
        self._stored = {n[len(prefix) :]: n for n in names if n.startswith(prefix)}
        self.metadata = file.metadata

    @classmethod
    @contextmanager
    def open(
        cls, path: str, names_of: NamesOf, axes: Mapping[str, int] | None = None
    ) -> Iterator["CheckpointFile"]:
        """Raises CheckpointError if the file is missing, cut short or not of its format.

        ``path`` may also be a diffusers folder, which then looks like the ComfyUI file, by the
        names that ``names_of`` gives its tensors. ``axes``: see ``GGUFFile``.
        """
        kind = _format(path)
        given = {"DiffusersFolder": (names_of,), "GGUFFile": (axes,)}.get(kind.__name__, ())
        try:
            with kind(path, *given) as file:
                yield cls(file)
        except FormatError as error:
            raise CheckpointError(
                f"The model file {path} is not a whole {kind.FORMAT} file: {error}. Download it "
                "again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"The model file {path} cannot be read: {error}.") from error

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that were read."""
        return self._file.bytes_read

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor's shape and dtype, from the header alone."""
        return {name: self._file.tensors[stored] for name, stored in self._stored.items()}

    def read(
        self, name: str, rows: tuple[int, int] | None, columns: tuple[int, int] | None
    ) -> torch.Tensor:
        """A tensor, or the given range of its first and second axes; to be copied at once."""
        return self._file.read(self._stored[name], rows, columns)


def _format(path: str) -> "type[SafetensorsFile | DiffusersFolder | GGUFFile]":
    """What reads the file. Raises CheckpointError."""
    if Path(path).is_dir():
        return DiffusersFolder
    if not Path(path).is_file():
        raise CheckpointError(f"The model file {path} does not exist. Choose another file.")
    if not path.lower().endswith(".gguf"):
        return SafetensorsFile
    try:
        from .gguf_file import GGUFFile
    except ImportError as error:
        raise CheckpointError(
            f"Reading the GGUF file {path} needs the package 'gguf', which is not installed in "
            f"{sys.executable} ({error}). ComfyUI and the group's ranks read it: if "
            f"TP_RUNTIME_PYTHON is another Python, both need it. Run: {sys.executable} -m pip "
            "install gguf"
        ) from error
    return GGUFFile
