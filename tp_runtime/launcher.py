"""Starts and ends the processes of a group. Part of the engine's half.

``Launcher`` is the seam: the engine knows ranks only as ``Rank`` objects (a channel to talk to,
a process to watch and to end). ``LocalLauncher`` runs them as subprocesses of this machine.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import psutil

from .config import GroupConfig, WorkerConfig, home, log_level
from .errors import GroupStartError
from .tensors import Exchange
from .transport import Channel

LOG_TAIL_BYTES = 4000
KEPT_GROUP_FOLDERS = 10  # of groups that are gone, so that their logs can still be read

# What vLLM, NCCL and torch must know before they are imported by a rank. NVLink multicast and
# vLLM's use of it stay off: it is a shared resource of the whole NVSwitch fabric.
_RANK_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Rank:
    """One running rank, seen from the engine."""

    index: int
    channel: Channel
    process: subprocess.Popen[bytes]
    death_fd: int  # a pidfd: readable as soon as the process has ended
    log_path: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def describe_exit(self) -> str:
        """How the process ended, for a message to a person."""
        code = self.process.poll()
        if code is None:
            return "closed its connection"
        if code < 0:
            return f"was killed by signal {-code}"
        return f"exited with status {code}"

    def log_tail(self) -> str:
        """The end of the rank's log."""
        try:
            data = self.log_path.read_bytes()
        except FileNotFoundError:
            return ""
        return data[-LOG_TAIL_BYTES:].decode(errors="replace").strip()

    def end(self, timeout_s: float) -> None:
        """Wait ``timeout_s`` for the process to end by itself, then kill it. Idempotent."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.channel.close()
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1


class Launcher(Protocol):
    """Starts the ranks of a group and cleans up after them."""

    def launch(self, config: GroupConfig, exchange: Exchange) -> list[Rank]:
        """Start all ranks; none may be left if one does not start."""
        ...

    def clean_up(self, keep_logs: bool) -> None:
        """Remove what the ranks left on disk, after all of them have ended. Idempotent."""
        ...


class LocalLauncher:
    """Ranks as subprocesses of this machine, in sessions of their own.

    A session of its own keeps a Ctrl-C in ComfyUI's terminal from reaching the rank in the
    middle of a collective; the rank ends when its control stream does.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def launch(self, config: GroupConfig, exchange: Exchange) -> list[Rank]:
        self._folder = _new_group_folder()
        ranks: list[Rank] = []
        try:
            for index in range(config.tp_size):
                ranks.append(self._launch_rank(config, index, exchange, self._folder))
        except OSError as error:
            for rank in ranks:
                rank.end(0)
            self.clean_up(keep_logs=False)
            raise GroupStartError(
                f"The runtime's Python {config.python!r} could not be started: {error}. "
                "Set TP_RUNTIME_PYTHON to a Python that has vllm and diffusers installed."
            ) from error
        return ranks

    def _launch_rank(
        self, config: GroupConfig, index: int, exchange: Exchange, folder: Path
    ) -> Rank:
        channel, rank_end = Channel.pair()
        worker = WorkerConfig(
            rank=index,
            tp_size=config.tp_size,
            device=config.device,
            control_fd=rank_end.fileno(),
            exchange_fd=exchange.fd,
            rendezvous=(folder / "rendezvous").as_uri(),
            parent_pid=os.getpid(),
            num_threads=max(1, _usable_cores() // config.tp_size),
            log_level=log_level(),
        )
        command = [config.python, "-m", "tp_runtime.worker", msgspec.json.encode(worker).decode()]
        log_path = folder / f"rank{index}.log"
        with rank_end, open(log_path, "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(config),
                pass_fds=(rank_end.fileno(), exchange.fd),
                start_new_session=True,
            )
        return Rank(index, channel, process, os.pidfd_open(process.pid), log_path)

    def clean_up(self, keep_logs: bool) -> None:
        if self._folder is not None and not keep_logs:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _environment(config: GroupConfig) -> dict[str, str]:
    environment = {**_RANK_ENVIRONMENT, **os.environ}
    package_root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = (
        package_root if not inherited else package_root + os.pathsep + inherited
    )
    environment["VLLM_LOGGING_LEVEL"] = log_level()
    # The group never leaves this machine: its sockets bind to the loopback device only.
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    environment["NCCL_SOCKET_IFNAME"] = "lo"
    if config.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        chosen = [names[index] if names else str(index) for index in config.devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment


def _new_group_folder() -> Path:
    """A private folder named after this process; folders of processes long gone are removed."""
    groups = home() / "groups"
    groups.mkdir(parents=True, exist_ok=True, mode=0o700)
    gone = [
        folder
        for folder in sorted(groups.iterdir(), key=lambda entry: entry.stat().st_mtime)
        if not _owner_lives(folder)
    ]
    for folder in gone[:-KEPT_GROUP_FOLDERS]:
        shutil.rmtree(folder, ignore_errors=True)
    # mkdtemp makes the folder readable by its owner only.
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=groups))


def _owner_lives(folder: Path) -> bool:
    pid = folder.name.partition("-")[0]
    return pid.isdigit() and psutil.pid_exists(int(pid))
