"""Starts and ends the processes of a group. Part of the engine's half.

``Launcher`` is the seam: the engine knows ranks only as ``Rank`` objects (a channel to talk to,
a process to watch and to end). ``LocalLauncher`` runs them as subprocesses of this machine.
"""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from .config import GroupConfig, WorkerConfig, attention_kernel, fault_file, home, log_level
from .errors import GroupStartError
from .group_folder import GroupFolder
from .tensors import Exchange
from .transport import Channel, wait

logger = logging.getLogger("tp_runtime")

KILL_TIMEOUT_S = 10.0
LOG_TAIL_BYTES = 4000

# What vLLM, NCCL and torch must know before they are imported by a rank. NVLink multicast and
# vLLM's use of it stay off: it is a shared resource of the whole NVSwitch fabric.
_RANK_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # ComfyUI's folder has modules named utils, server, tests, ...
}

_COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}

# Signals that say what has happened.
_SIGNALS: dict[int, str] = {
    signal.SIGKILL: " (by somebody, or by Linux because the host's memory ran out)",
    signal.SIGBUS: " (a file that it was reading was cut short, or the host's memory ran out)",
}

# PR_SET_PDEATHSIG: the kernel ends the rank together with the thread that started it, whatever
# it is doing. Set before the imports, which take seconds; if that was too late, the stream's other
# end is closed.
_RANK_CODE = """\
import ctypes, json, runpy, select, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
stream = select.poll()
stream.register(json.loads(sys.argv[1])["control_fd"], select.POLLHUP)
stream.poll(0) and sys.exit()
runpy.run_module("tp_runtime.worker", run_name="__main__", alter_sys=True)"""


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

    def ended(self, timeout_s: float) -> bool:
        """Whether the process has ended, at the latest after ``timeout_s``."""
        return self.process.poll() is not None or (
            bool(wait([self.death_fd], timeout_s)) and self.process.poll() is not None
        )

    def describe_exit(self) -> str:
        """How the process ended, for a message to a person."""
        code = self.process.poll()
        if code is None:
            return "closed its connection"
        if code < 0:
            return f"was killed by signal {-code}{_SIGNALS.get(-code, '')}"
        return f"exited with status {code}"

    def log_tail(self) -> str:
        """The end of the rank's log."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                return log.read(LOG_TAIL_BYTES).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""

    def release(self) -> None:
        """Close what this process holds of the rank. Idempotent."""
        self.channel.close()
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1


def end_ranks(ranks: Sequence[Rank], grace_s: float) -> None:
    """Wait ``grace_s`` for the processes to end by themselves, then kill them all. Idempotent."""
    ranks = [rank for rank in ranks if rank.death_fd >= 0]
    deadline = time.monotonic() + grace_s
    for rank in ranks:
        rank.ended(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.process.kill()  # does nothing if it has ended
    deadline = time.monotonic() + KILL_TIMEOUT_S
    for rank in ranks:
        if not rank.ended(max(0.0, deadline - time.monotonic())):
            logger.error(
                "rank %d (process %d) was killed but has not ended after %g s: a driver holds it",
                rank.index,
                rank.pid,
                KILL_TIMEOUT_S,
            )
        rank.release()


class Launcher(Protocol):
    """Starts the ranks of a group and cleans up after them."""

    def launch(self, config: GroupConfig, exchange: Exchange) -> list[Rank]:
        """Start all ranks; none may be left if one does not start.

        They end with the calling thread, at the latest.
        """
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
        self._folder: GroupFolder | None = None

    def launch(self, config: GroupConfig, exchange: Exchange) -> list[Rank]:
        ranks: list[Rank] = []
        try:
            self._folder = GroupFolder.create()
            for index in range(config.tp_size):
                ranks.append(self._launch_rank(config, index, exchange, self._folder.path))
        except BaseException as error:
            end_ranks(ranks, grace_s=0)
            self.clean_up(keep_logs=False)
            if isinstance(error, OSError):
                raise GroupStartError(
                    f"The runtime's Python {config.python!r} could not be started: {error}. "
                    "Set TP_RUNTIME_PYTHON to a Python that has vllm and diffusers installed."
                ) from error
            raise
        return ranks

    def _launch_rank(
        self, config: GroupConfig, index: int, exchange: Exchange, folder: Path
    ) -> Rank:
        channel, rank_end = Channel.pair()
        with contextlib.ExitStack() as on_error, rank_end:
            on_error.callback(channel.close)
            worker = WorkerConfig(
                rank=index,
                tp_size=config.tp_size,
                device=config.device,
                control_fd=rank_end.fileno(),
                exchange_fd=exchange.fd,
                # Not as_uri(): torch takes the path as it is, percent signs included.
                rendezvous=f"file://{folder / 'rendezvous'}",
                num_threads=max(1, _usable_cores() // config.tp_size),
                log_level=log_level(),
                fault_file=fault_file(),
                attention=attention_kernel(),
            )
            arguments = ["-c", _RANK_CODE, msgspec.json.encode(worker).decode()]
            log_path = folder / f"rank{index}.log"
            # For appending, so that the rank can shorten it; readable by its owner only.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with open(os.open(log_path, flags, 0o600), "ab") as log:
                process = subprocess.Popen(
                    [config.python, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=_environment(config),
                    pass_fds=(rank_end.fileno(), exchange.fd),
                    start_new_session=True,
                )
            on_error.callback(process.kill)
            rank = Rank(index, channel, process, os.pidfd_open(process.pid), log_path)
            on_error.pop_all()
        return rank

    def clean_up(self, keep_logs: bool) -> None:
        if self._folder is not None:
            self._folder.release(keep_logs)
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
        # What a rank compiles is there at the next start; torch's own choice is below /tmp.
        for variable, name in _COMPILE_CACHES.items():
            environment.setdefault(variable, str(home() / "compiled" / name))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        chosen = [names[index] if names else str(index) for index in config.devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment
