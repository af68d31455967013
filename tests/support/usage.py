"""What a ComfyUI server and its ranks take of the machine, to see that nothing grows."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from support.comfy_server import ComfyServer


@dataclass(frozen=True)
class Usage:
    """By process id, the server's first: bytes of memory, open files, threads. `shared`: bytes.

    Files are all file descriptors but network connections, which come and go with requests; also
    between two looks at the process, so what are none is counted, not the difference.
    """

    rss: dict[int, int]
    files: dict[int, int]
    threads: dict[int, int]
    shared: int

    @classmethod
    def of(cls, server: ComfyServer) -> "Usage":
        processes = [psutil.Process(server.process.pid), *server.children()]
        return cls(
            {process.pid: process.memory_info().rss for process in processes},
            {process.pid: _num_files(process) for process in processes},
            {process.pid: process.num_threads() for process in processes},
            sum(_exchange_bytes(process.pid) for process in processes),
        )


def _num_files(process: psutil.Process) -> int:
    links = [_target(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    no_sockets = [target for target in links if target and not target.startswith("socket:")]
    return len(no_sockets) + len(process.net_connections("unix"))


def _target(link: Path) -> str | None:
    """What a file descriptor is of; None if it has been closed meanwhile."""
    try:
        return str(link.readlink())
    except FileNotFoundError:
        return None


def _exchange_bytes(pid: int) -> int:
    """Of the anonymous shared memory that the process has open."""
    memories = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:tp-runtime-exchange" in (_target(link) or ""):
            stat = link.stat()
            memories[stat.st_ino] = stat.st_size
    return sum(memories.values())
