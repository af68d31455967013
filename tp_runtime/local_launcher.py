"""Runs the ranks of a group as processes of this machine. Part of the engine's half.

They are forked from a process that has imported what they need; ``forking`` has it.
"""

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec

from . import failures
from .config import GroupConfig, WorkerConfig, attention_kernel, fault_file, home, log_level
from .errors import GroupStartError
from .forking import MAX_ANSWER_BYTES, ForkServer, ForkServerError, fork_server
from .group_folder import GroupFolder
from .launcher import Poll, Rank, describe_status, end_ranks, tail_of
from .tensors import Exchange
from .transport import Channel, wait

STATUS_TIMEOUT_S = 1.0  # it comes a moment after the end

# What vLLM, NCCL and torch must know before they are imported. NVLink multicast and vLLM's use of
# it stay off: it is a shared resource of the whole NVSwitch fabric.
_DEFAULT_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # ComfyUI's folder has modules named utils, server, tests, ...
}

_ENVIRONMENT = {
    # The group never leaves this machine: its sockets bind to the loopback device only.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # For the fork server: numpy's import starts no threads, and whether there is a GPU is asked
    # of the driver's management library, which leaves CUDA as it is.
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}

# What a rank compiles is there at the next start; torch's own choice is below /tmp.
_COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


@dataclass
class LocalRank:
    """One running rank of this machine: a child of the fork server, not of this process."""

    index: int
    channel: Channel
    pid: int
    death_fd: int  # a pidfd
    status: socket.socket  # where the fork server tells how the process has ended
    server: ForkServer
    log_path: Path

    def ended(self, timeout_s: float) -> bool:
        return bool(wait([self.death_fd], timeout_s))

    def describe_exit(self) -> str:
        if not self.ended(0):
            return "closed its connection"
        told = wait([self.status], STATUS_TIMEOUT_S)
        if told and (packet := self.status.recv(MAX_ANSWER_BYTES, socket.MSG_PEEK)):
            return describe_status(msgspec.json.decode(packet, type=int))
        server = f"its fork server (process {self.server.pid})"
        return f"ended with {server}, which {self.server.describe_exit()}"

    def log_tail(self) -> str:
        try:
            with open(self.log_path, "rb") as log:
                return tail_of(log)
        except FileNotFoundError:
            return ""

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.death_fd, signal.SIGKILL)

    def release(self) -> None:
        self.channel.close()
        self.status.close()
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1


class LocalLauncher:
    """Ranks as processes of this machine, in sessions of their own.

    A session of its own keeps a Ctrl-C in ComfyUI's terminal from reaching the rank in the
    middle of a collective; the rank ends when its control stream does.
    """

    def __init__(self) -> None:
        self._server: ForkServer | None = None
        self._folder: GroupFolder | None = None

    def prepare(self, config: GroupConfig, poll: Poll) -> None:
        """Have the group's folder, and a fork server that is up."""
        try:
            self._folder = GroupFolder.create()
            self._server = _running_server(config, poll)
        except BaseException:
            self.clean_up(keep_logs=False)
            raise

    def launch(self, config: GroupConfig, exchange: Exchange) -> list[Rank]:
        ranks: list[Rank] = []
        try:
            for index in range(config.tp_size):
                ranks.append(self._launch_rank(config, index, exchange))
        except BaseException as error:
            end_ranks(ranks, grace_s=0)
            self.clean_up(keep_logs=False)
            if isinstance(error, OSError | ForkServerError):
                raise GroupStartError(
                    f"No process could be started for a rank of {config.tp_size}: {error}."
                ) from error
            raise
        return ranks

    def _launch_rank(self, config: GroupConfig, index: int, exchange: Exchange) -> LocalRank:
        assert self._folder is not None, "prepare comes first"
        assert self._server is not None, "prepare comes first"
        folder = self._folder.path
        worker = WorkerConfig(
            rank=index,
            tp_size=config.tp_size,
            device=config.device,
            # Not as_uri(): torch takes the path as it is, percent signs included.
            rendezvous=f"file://{folder / 'rendezvous'}",
            num_threads=max(1, _usable_cores() // config.tp_size),
            log_level=log_level(),
            fault_file=fault_file(),
            attention=attention_kernel(),
        )
        log_path = folder / f"rank{index}.log"
        # For appending, so that the rank can shorten it; readable by its owner only.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        channel, rank_end = Channel.pair()
        with contextlib.ExitStack() as on_error, rank_end:
            on_error.callback(channel.close)
            with open(os.open(log_path, flags, 0o600), "ab") as log:
                fds = (rank_end.fileno(), exchange.fd, log.fileno())
                forked = self._server.fork(worker, _rank_environment(config), fds)
            on_error.pop_all()
        return LocalRank(index, channel, *forked, self._server, log_path)

    def clean_up(self, keep_logs: bool) -> None:
        if self._folder is not None:
            self._folder.release(keep_logs)
            self._folder = None


def _running_server(config: GroupConfig, poll: Poll) -> ForkServer:
    """A fork server that is up: that of an earlier group, or a new one. Raises GroupStartError."""
    while True:
        try:
            server = fork_server(config.python, _environment())
            is_new = not server.is_up
            server.wait_until_up(poll, config.start_timeout_s)
            return server
        except OSError as error:
            raise GroupStartError(
                f"The runtime's Python {config.python!r} could not be started: {error}. "
                "Set TP_RUNTIME_PYTHON to a Python that has vllm and diffusers installed."
            ) from error
        except ForkServerError as error:
            if is_new:
                raise failures.no_fork_server(config, error, server.log_tail()) from error
            # It has ended since the last group: it had no rank for long, or was killed.


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _environment() -> dict[str, str]:
    """Of the fork server: this process's, and what all ranks have in common."""
    package_root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    return {
        **_DEFAULT_ENVIRONMENT,
        **{variable: str(home() / "compiled" / name) for variable, name in _COMPILE_CACHES.items()},
        **os.environ,
        **_ENVIRONMENT,
        "VLLM_LOGGING_LEVEL": log_level(),
        "PYTHONPATH": package_root + os.pathsep + inherited if inherited else package_root,
    }


def _rank_environment(config: GroupConfig) -> dict[str, str]:
    """Of a rank: it sees the GPUs of its group only."""
    environment = _environment()
    if config.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        chosen = [names[index] if names else str(index) for index in config.devices]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    return environment
