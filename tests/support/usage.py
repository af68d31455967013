"""What a ComfyUI server and its ranks take of the machine, to see that nothing grows."""

from dataclasses import dataclass
from pathlib import Path

import psutil

from support.comfy_server import ComfyServer


@dataclass(frozen=True)
class Usage:
    """By process id, the server's first: bytes of memory, open files, threads. `shared`: bytes.

    Files are all file descriptors but network connections, which come and go with requests.
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
    return process.num_fds() - len(process.net_connections("inet"))


def _exchange_bytes(pid: int) -> int:
    """Of the anonymous shared memory that the process has open."""
    memories = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "memfd:tp-runtime-exchange" in str(link.readlink()):
            stat = link.stat()
            memories[stat.st_ino] = stat.st_size
    return sum(memories.values())
