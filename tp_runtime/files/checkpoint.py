"""Reads model files: what is in them, and slices of their tensors.

Safetensors files, GGUF files, diffusers folders and single files of theirs; nothing is ever
unpickled. Names are ComfyUI's, with the prefix that full checkpoints carry taken off.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import reasons
from ..errors import CheckpointError
from .diffusers_folder import DiffusersFolder, NamesAlone, NamesOf
from .quantised import MARKER
from .safetensors_file import FormatError, SafetensorsFile, TensorInfo

if TYPE_CHECKING:
    from .gguf_file import GGUFFile

# What people call the files that can be read.
FORMATS = (
    *("bf16", "fp16", "fp32", "fp8, plain and scaled", "int8, also with ConvRot", "mxfp8", "nvfp4"),
    *("4 bits (convrot_w4a4, asym_w4a8_int8)", "GGUF"),
)
# As ComfyUI 0.3.75 chooses one (unet_prefix_from_state_dict in comfy/model_detection.py): the most
# frequent of the first three, if more tensors have it than _FEW, else the one after them. The last
# is what training tools write.
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.")
_OTHER_PREFIXES = ("model.", "diffusion_model.")
_FEW = 5

# What files begin with that are of another kind, whatever their names say; and what to do.
_NO_MODEL = {
    b"PK\x03\x04": (
        "is a pickle (torch.save), which may hold code and is never read. Convert it to safetensors"
    ),
    b"\x80": "is a pickle, which may hold code and is never read. Convert it to safetensors",
    b"GGUF": "is a GGUF file. Give it a name that ends in .gguf",
    b"version https://git-lfs": (
        "is a pointer of Git LFS in the place of the model. Download it again, with git lfs pull"
    ),
    b"<": "is a web page in the place of the model. Download it again",
}


class CheckpointFile:
    """A model file that is open for reading, by ComfyUI's names of its tensors.

    ``prefix``: what the file has before those names.
    """

    def __init__(self, file: "SafetensorsFile | DiffusersFolder | GGUFFile") -> None:
        self._file = file
        names = list(file.tensors)
        self.prefix = _prefix(names)
        self._stored = {n.removeprefix(self.prefix): n for n in names if n.startswith(self.prefix)}
        if MARKER in names:  # ComfyUI looks for it without the prefix, too
            self._stored.setdefault(MARKER, MARKER)
        self.metadata = file.metadata

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str,
        names_of: NamesOf,
        names_alone: NamesAlone = lambda _: None,
        axes: Mapping[str, int] | None = None,
    ) -> Iterator["CheckpointFile"]:
        """Raises CheckpointError if the file is missing, cut short or not of its format.

        ``path`` may also be a diffusers folder, which then looks like the ComfyUI file, by the
        names that ``names_of`` gives its tensors; or a single file of one, which has the names that
        ``names_alone`` gives. ``axes``: see ``GGUFFile``.
        """
        kind = _format(path)
        given = {"DiffusersFolder": (names_of,), "GGUFFile": (axes,)}.get(kind.__name__, ())
        try:
            with kind(path, *given) as file:
                alone = isinstance(file, SafetensorsFile) and names_alone(file.tensors)
                yield cls(DiffusersFolder.of_file(file, alone) if alone else file)
        except FormatError as error:
            what = _no_model(path) if kind is SafetensorsFile else None
            if what is not None:
                raise CheckpointError(
                    f"The model file {path} {what}, or load it with the stock 'Load Diffusion "
                    "Model' node."
                ) from error
            raise CheckpointError(
                f"The model file {path} is not a whole {kind.FORMAT} file: {error}. Download it "
                "again."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"The model file {path} cannot be read: {reasons.of(error)}"
            ) from error

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


def _prefix(names: Sequence[str]) -> str:
    """What stands before the names of the diffusion model's tensors; empty: nothing does."""
    counts = Counter(next((p for p in _PREFIXES if n.startswith(p)), "") for n in names)
    found = max(_PREFIXES, key=counts.__getitem__)
    if counts[found] > _FEW:
        return found
    return next((p for p in _OTHER_PREFIXES if any(n.startswith(p) for n in names)), "")


def _no_model(path: str) -> str | None:
    """What a file is that is no model; None: not known."""
    with open(path, "rb") as file:
        begin = file.read(64)
    return next((what for magic, what in _NO_MODEL.items() if begin.startswith(magic)), None)


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
