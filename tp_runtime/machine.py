"""What this process may use of the machine: the least of the host's and of its control groups'.

A container's memory and its share of the processors are limits of control groups (cgroups); what
psutil and ``os`` tell are the host's. A group's limits are its own and those of all above it. Both
versions are read: https://docs.kernel.org/admin-guide/cgroup-v2.html (``memory.max``, ``cpu.max``),
and .../cgroup-v1/memory.html and .../scheduler/sched-bwc.html.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Memory:
    """Bytes that this process and its ranks may have in all, and how many of them are free."""

    total: int
    available: int


def memory() -> Memory:
    """The memory of the host, or of the control group where that has less."""
    import psutil  # here: `doctor` runs where it is missing

    host = psutil.virtual_memory()
    total, available = host.total, host.available
    for folder, version in _groups("memory"):
        for name in _LIMITS[version]:
            with contextlib.suppress(OSError, ValueError):  # no limit there, or "max"
                limit = int((folder / name).read_text())
                total = min(total, limit)
                available = min(available, limit - _used(folder, version))
    return Memory(total, max(0, available))


def cores() -> int:
    """Processors that this process may keep busy, at least 1; a part of one counts as one."""
    found = float(len(os.sched_getaffinity(0)))
    for folder, version in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
            if quota > 0:
                found = min(found, quota / period)
    return max(1, math.ceil(found))


_LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
# Pages of files that are not written to count as used, and make room when it is needed.
_FILES = {1: ("total_active_file", "total_inactive_file"), 2: ("active_file", "inactive_file")}


def _used(folder: Path, version: int) -> int:
    used = int((folder / _USAGE[version]).read_text())
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in _FILES[version]:
            used -= int(value)
    return max(0, used)


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of this process's control group and of those above it, with the version.

    A container may be shown a part of the tree only: then what it is told as its path begins with
    that part, or is no path below the mounted one, which is its own group then.
    """
    paths = _paths()
    for root, mounted, kind, options in _mounts():
        version = 2 if kind == "cgroup2" else 1
        path = paths.get("" if version == 2 else controller)
        if path is None or (version == 1 and controller not in options):
            continue
        inside = os.path.relpath(path, root)
        folder = mounted if inside.startswith("..") else mounted / inside
        if not folder.is_dir():
            folder = mounted
        while True:
            yield folder, version
            if folder == mounted:
                break
            folder = folder.parent


def _lines(name: str) -> list[str]:
    """Of a file of this process's; a path may be no UTF-8. Raises OSError."""
    return (_PROC / name).read_text(errors="surrogateescape").splitlines()


def _paths() -> dict[str, str]:
    """Controller → this process's group; "" stands for version 2."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in _lines("cgroup"):
            _, controllers, path = line.split(":", 2)
            found |= dict.fromkeys(controllers.split(","), path)
    return found


def _mounts() -> Iterator[tuple[str, Path, str, list[str]]]:
    """Of each mounted tree of control groups: its root, folder, kind and options."""
    try:
        lines = _lines("mountinfo")
    except OSError:
        return
    for line in lines:
        place, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root, folder = place.split(" ")[3:5]
            yield root, Path(folder), kind, options.split(",")


def refused_system_call() -> str:
    """The first system call that a group needs and this process may not make; empty: none.

    With the system's words, as in "pidfd_open (Operation not permitted)".
    """

    def pidfd_open() -> int:
        return os.pidfd_open(os.getpid())

    def memfd_create() -> int:
        return os.memfd_create("tp-runtime-probe", os.MFD_CLOEXEC)

    def eventfd() -> int:
        return os.eventfd(0, os.EFD_CLOEXEC)

    for call in (pidfd_open, memfd_create, eventfd):
        try:
            os.close(call())
        except OSError as error:
            return f"{call.__name__} ({error.strerror})"
    return ""
