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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from .config import GroupConfig, WorkerConfig, fault_file, log_level
from .errors import GroupStartError
from .group_folder import GroupFolder
from .tensors import Exchange
from .transport import Channel, wait

logger = logging.getLogger("tp_runtime")

KILL_TIMEOUT_S = 10.0
LOG_TAIL_BYTES = 4000

Poll = Callable[[], None]

# What vLLM, NCCL and torch must know before they are imported by a rank. NVLink multicast and
# vLLM's use of it stay off: it is a shared resource of the whole NVSwitch fabric.
RANK_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # ComfyUI's folder has modules named utils, server, tests, ...
}

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


class Rank(Protocol):
    """One running rank, seen from the engine.

    ``place``: which process it is, for a message to a person. ``death_fd``: readable as soon as
    the process has ended; -1 after ``release``. ``mirrored``: its exchange memory is not the
    engine's. ``clock_ahead_s``: of its monotonic clock before this machine's.
    """

    index: int
    channel: Channel
    death_fd: int
    log_path: Path
    mirrored: bool
    clock_ahead_s: float

    @property
    def pid(self) -> int: ...

    @property
    def place(self) -> str: ...

    def ended(self, timeout_s: float) -> bool:
        """Whether the process has ended, at the latest after ``timeout_s``."""
        ...

    def describe_exit(self) -> str:
        """How the process ended, for a message to a person."""
        ...

    def log_tail(self) -> str:
        """The end of the rank's log."""
        ...

    def kill(self) -> None:
        """End the process now. Does nothing if it has ended."""
        ...

    def release(self) -> None:
        """Close what this process holds of the rank. Idempotent."""
        ...


@dataclass
class LocalRank:
    """A rank that is a subprocess."""

    index: int
    channel: Channel
    process: subprocess.Popen[bytes]
    death_fd: int  # a pidfd
    log_path: Path
    mirrored: bool = False
    clock_ahead_s: float = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def place(self) -> str:
        return f"process {self.pid}"

    def kill(self) -> None:
        self.process.kill()

    def ended(self, timeout_s: float) -> bool:
        return self.process.poll() is not None or (
            bool(wait([self.death_fd], timeout_s)) and self.process.poll() is not None
        )

    def describe_exit(self) -> str:
        self.ended(timeout_s=1.0)  # its stream ends a moment before the process does
        code = self.process.poll()
        if code is None:
            return "closed its connection"
        if code < 0:
            return f"was killed by signal {-code}{_SIGNALS.get(-code, '')}"
        return f"exited with status {code}"

    def log_tail(self) -> str:
        return tail_of(self.log_path)

    def release(self) -> None:
        self.channel.close()
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1


def tail_of(log_path: Path) -> str:
    """The end of a log, for a message to a person."""
    try:
        with open(log_path, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return log.read(LOG_TAIL_BYTES).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def end_ranks(ranks: Sequence[Rank], grace_s: float) -> None:
    """Wait ``grace_s`` for the processes to end by themselves, then kill them all. Idempotent."""
    ranks = [rank for rank in ranks if rank.death_fd >= 0]
    deadline = time.monotonic() + grace_s
    for rank in ranks:
        rank.ended(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()
    deadline = time.monotonic() + KILL_TIMEOUT_S
    for rank in ranks:
        if not rank.ended(max(0.0, deadline - time.monotonic())):
            logger.error(
                "rank %d (%s) was killed but has not ended after %g s: a driver holds it",
                rank.index,
                rank.place,
                KILL_TIMEOUT_S,
            )
        rank.release()


class Launcher(Protocol):
    """Starts the ranks of a group and cleans up after them."""

    def prepare(self, config: GroupConfig, poll: Poll) -> None:
        """Have all there that ``launch`` needs; what takes long is done here.

        ``poll`` is called every 10 ms or so while waiting; what it raises ends the wait.

        Raises:
            GroupStartError: it cannot be had, or not within the time that a start may take.
        """
        ...

    def launch(self, config: GroupConfig, exchange: Exchange) -> Sequence[Rank]:
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

    def prepare(self, config: GroupConfig, poll: Poll) -> None:
        pass

    def launch(self, config: GroupConfig, exchange: Exchange) -> list[LocalRank]:
        ranks: list[LocalRank] = []
        try:
            self._folder = GroupFolder.create()
            for index in range(config.num_ranks):
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
    ) -> LocalRank:
        channel, rank_end = Channel.pair()
        with contextlib.ExitStack() as on_error, rank_end:
            on_error.callback(channel.close)
            worker = WorkerConfig(
                rank=index,
                local_rank=index,
                tp_size=config.tp_size,
                batch_groups=config.batch_groups,
                device=config.device,
                control_fd=rank_end.fileno(),
                exchange_fd=exchange.fd,
                # Not as_uri(): torch takes the path as it is, percent signs included.
                rendezvous=f"file://{folder / 'rendezvous'}",
                num_threads=max(1, _usable_cores() // config.num_ranks),
                log_level=log_level(),
                fault_file=fault_file(),
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
            rank = LocalRank(index, channel, process, os.pidfd_open(process.pid), log_path)
            on_error.pop_all()
        return rank

    def clean_up(self, keep_logs: bool) -> None:
        if self._folder is not None:
            self._folder.release(keep_logs)
            self._folder = None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def inherited_environment() -> dict[str, str]:
    """This process's environment, made fit for one that runs this package."""
    environment = {**RANK_ENVIRONMENT, **os.environ}
    package_root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = (
        package_root if not inherited else package_root + os.pathsep + inherited
    )
    environment["VLLM_LOGGING_LEVEL"] = log_level()
    return environment


def _environment(config: GroupConfig) -> dict[str, str]:
    environment = inherited_environment()
    # The group never leaves this machine: its sockets bind to the loopback device only.
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    environment["NCCL_SOCKET_IFNAME"] = "lo"
    if config.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        chosen = [names[index] if names else str(index) for index in config.devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment
