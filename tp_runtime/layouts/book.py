"""Small JSON files of what was measured on this machine, by a key. They only help.

What cannot be read counts as not there: another release's, or a damaged one. What cannot be
written is not kept.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def read_book(path: Path, kind: type[T]) -> dict[str, T]:
    """The entries of the file that are of that kind."""
    try:
        book = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}  # not there yet, or damaged
    found = {}
    for key, raw in book.items():
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            found[key] = msgspec.json.decode(raw, type=kind)
    return found


def write_book(path: Path, book: Mapping[str, Any]) -> None:
    """Put these entries in the place of the file's, at once."""
    with contextlib.suppress(OSError):  # a disk that is full is no reason to stop
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with open(fd, "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(book)))
            Path(name).replace(path)
        except OSError:
            Path(name).unlink()
