"""Which kernel was fastest for what, kept between starts: every rank of a machine takes the same.

A file of lines, each a JSON list of what a choice was made for, as text, and the kernel's name. The
first line of a text stands. Ranks append at once and then read, so all of them, and every later
start, compute in the same way.
"""

import logging
import os
from pathlib import Path

import msgspec

logger = logging.getLogger("tp_runtime.gpu.kernel_choices")

LIMIT_BYTES = 2**20  # a file of more is begun anew


class KernelChoices:
    """The choices in one file. What cannot be read is made again; what cannot be kept, is not."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> str | None:
        """The name that stands for ``key``, or None."""
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:  # there is none yet
            return None
        for line in lines:
            try:
                known, name = msgspec.json.decode(line, type=tuple[str, str])
            except msgspec.DecodeError:  # not ours, or written half
                continue
            if known == key:
                return name
        return None

    def keep(self, key: str, name: str) -> str:
        """``name``, unless another rank was faster; then what that rank has kept."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            file = os.open(self._path, flags, 0o600)
            try:
                if os.fstat(file).st_size > LIMIT_BYTES:
                    os.ftruncate(file, 0)
                os.write(file, msgspec.json.encode((key, name)) + b"\n")
            finally:
                os.close(file)
        except OSError as error:
            logger.warning("The choice of a kernel is not kept in %s: %s", self._path, error)
            return name
        return self.get(key) or name
