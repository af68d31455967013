"""The folder of a group on disk, which has its logs."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from ... import reasons
from ...config import home
from ...errors import GroupStartError

KEPT_FOLDERS = 10  # of groups that are gone, so that their logs can still be read


class GroupFolder:
    """The private folder of a live group, for its logs.

    A lock on it, which ends with this process, tells a live group's folder from one that a
    process left when it was killed. Process numbers would not: they are used again, and mean
    something else in another container that shares the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd = os.open(path, os.O_RDONLY)  # not inherited by the ranks
        with contextlib.suppress(OSError):  # a file system without locks: never swept
            # Waits for a moment if another process is looking whether this is a live group's.
            fcntl.flock(self._lock_fd, fcntl.LOCK_SH)

    @classmethod
    def create(cls) -> "GroupFolder":
        """A new folder; the folders of groups long gone are removed.

        Raises:
            GroupStartError: ``home()`` is not a place for it.
        """
        groups = home() / "groups"
        try:
            groups.mkdir(parents=True, exist_ok=True, mode=0o700)
            _sweep(groups)
            # mkdtemp makes the folder readable by its owner only.
            return cls(Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=groups)))
        except OSError as error:
            raise GroupStartError(
                f"The folder {groups} for the ranks' logs cannot be written ({error}). "
                f"{reasons.advice(str(error)) or reasons.STATE_FOLDER}"
            ) from error

    def release(self, keep: bool) -> None:
        """Give the folder up: removed now, or with the sweep of a later group. Idempotent."""
        if self._lock_fd < 0:
            return
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock_fd)
        self._lock_fd = -1


def _sweep(groups: Path) -> None:
    """Remove the folders of groups that are gone, except the newest, whose logs may be wanted."""
    gone = []
    for folder in groups.iterdir():
        with contextlib.suppress(OSError):  # removed meanwhile by another process
            if not _is_locked(folder):
                gone.append((folder.stat().st_mtime, folder))
    for _, folder in sorted(gone)[:-KEPT_FOLDERS]:
        shutil.rmtree(folder, ignore_errors=True)


def _is_locked(folder: Path) -> bool:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
