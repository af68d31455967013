"""Memory and cores: the least of the host's and of all control groups above this process."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tp_runtime import machine

GIB = 2**30
HOST = SimpleNamespace(total=64 * GIB, available=32 * GIB)


class Tree:
    """A `/proc/self` and mounted control groups, as files; a host of 64 GiB and 16 cores."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.mounted = folder / "cgroup"
        self.proc.mkdir()
        self.mounted.mkdir()

    def is_of(self, kind: str, path: str, root: str = "/") -> None:
        """The process's group is `path`; the tree is mounted from its folder `root` on."""
        controllers = "" if kind == "cgroup2" else "memory,cpu"
        options = f"rw,{controllers}" if controllers else "rw"
        (self.proc / "cgroup").write_text(f"5:pids:/elsewhere\n0:{controllers}:{path}\n")
        (self.proc / "mountinfo").write_text(
            "20 1 0:18 / /proc rw,relatime - proc proc rw\n"
            f"30 1 0:26 {root} {self.mounted} rw shared:4 - {kind} {kind} {options}\n"
        )

    def has(self, group: str, **files: str) -> None:
        folder = self.mounted / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path)
    monkeypatch.setattr(machine, "_PROC", tree.proc)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: HOST)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    return tree


def has_host_numbers() -> bool:
    return (machine.memory(), machine.cores()) == (machine.Memory(64 * GIB, 32 * GIB), 16)


def test_no_group_is_known(tree: Tree) -> None:
    assert has_host_numbers()
    tree.is_of("cgroup2", "/")
    assert has_host_numbers(), "the root has no limits"


def test_version_2(tree: Tree) -> None:
    """What can be had of pages of files is not used up."""
    tree.is_of("cgroup2", "/box")
    stat = f"anon {3 * GIB}\ninactive_file {2 * GIB}\nactive_file {GIB}\nshmem {GIB}\n"
    tree.has("box", memory__max=f"{8 * GIB}\n", memory__current=f"{6 * GIB}\n", memory__stat=stat)
    tree.has("box", cpu__max="250000 100000\n")
    assert machine.memory() == machine.Memory(8 * GIB, 5 * GIB)
    assert machine.cores() == 3


def test_a_mount_whose_name_is_no_utf8(tree: Tree) -> None:
    tree.is_of("cgroup2", "/box")
    tree.has("box", memory__max=f"{8 * GIB}\n", memory__current=f"{6 * GIB}\n")
    mounts = tree.proc / "mountinfo"
    before = mounts.read_bytes()
    mounts.write_bytes(b"30 1 8:1 / /media/M\xfcll rw - ext4 /dev/sdb1 rw\n" + before)
    assert machine.memory().total == 8 * GIB


def test_version_1(tree: Tree) -> None:
    tree.is_of("cgroup", "/box")
    tree.has("box", memory__limit_in_bytes=f"{8 * GIB}\n", memory__usage_in_bytes=f"{6 * GIB}\n")
    stat = f"inactive_file 1\ntotal_inactive_file {2 * GIB}\ntotal_active_file {GIB}\n"
    tree.has("box", memory__stat=stat, cpu__cfs_quota_us="50000\n", cpu__cfs_period_us="100000\n")
    assert machine.memory() == machine.Memory(8 * GIB, 5 * GIB)
    assert machine.cores() == 1


def test_no_limit(tree: Tree) -> None:
    tree.is_of("cgroup2", "/box")
    tree.has("box", memory__max="max\n", memory__current="1\n", memory__stat="", cpu__max="max 1\n")
    assert has_host_numbers()
    tree.is_of("cgroup", "/box")
    tree.has("box", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="1")
    tree.has("box", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert has_host_numbers()


def test_the_least_of_nested_groups(tree: Tree) -> None:
    """One above leaves less free, and another one has the smaller limit."""
    tree.is_of("cgroup2", "/pod/box/inner")
    of = {"memory__stat": "", "cpu__max": "400000 100000"}
    tree.has("pod", memory__max=f"{16 * GIB}", memory__current=f"{15 * GIB}", **of)
    tree.has("pod/box", memory__max="max", memory__high=f"{8 * GIB}", memory__current=f"{GIB}")
    tree.has("pod/box", memory__stat="", cpu__max="200000 100000")
    tree.has("pod/box/inner", memory__max="max", memory__current="1", **of)
    assert machine.memory() == machine.Memory(8 * GIB, GIB)
    assert machine.cores() == 2


@pytest.mark.parametrize(
    ("path", "root", "group"),
    [
        ("/docker/abc", "/docker/abc", ""),  # without a namespace, its own part is mounted
        ("/docker/abc/inner", "/docker/abc", "inner"),
        ("/", "/", ""),  # with a namespace of its own
        ("/../../outside", "/", ""),  # moved out of what its namespace shows
        ("/docker/abc", "/", ""),  # the path is the host's, and the mount the container's
    ],
)
def test_a_container_sees_a_part_of_the_tree(tree: Tree, path: str, root: str, group: str) -> None:
    tree.is_of("cgroup2", path, root)
    tree.has(group, memory__max=f"{4 * GIB}", memory__current=f"{GIB}", memory__stat="")
    assert machine.memory() == machine.Memory(4 * GIB, 3 * GIB)


def test_more_is_used_than_allowed(tree: Tree) -> None:
    """The limit was lowered."""
    tree.is_of("cgroup2", "/box")
    tree.has("box", memory__max=f"{GIB}", memory__current=f"{2 * GIB}", memory__stat="")
    assert machine.memory() == machine.Memory(GIB, 0)


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of this kernel, of either version, with 1 GiB; empty in the end."""
    groups = [folder for folder, _ in machine._groups("memory")]
    for parent in groups:
        group = parent / f"tp-test-{uuid.uuid4().hex}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            limit = next(group / name for name in LIMITS if (group / name).exists())
            limit.write_text(str(GIB))
            yield group
        except (OSError, StopIteration):
            continue
        else:
            return
        finally:
            group.rmdir()
    pytest.skip("no control group can be made here")


LIMITS = ("memory.max", "memory.limit_in_bytes")


def test_a_real_group(real_group: Path) -> None:
    """As this kernel writes it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            (real_group / "cgroup.procs").write_text(str(os.getpid()))
            found = machine.memory()
            status = 0 if found.total == GIB and 0 < found.available <= GIB else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
