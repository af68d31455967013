"""Runs the ranks of a group as processes of this machine.

They are forked from a process that has imported what they need and sees no GPU (``fork_client``).
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ... import machine, reasons
from ...config import (
    GroupConfig,
    WorkerConfig,
    cuda_index,
    fault_file,
    home,
    log_level,
    ranks_on_one_gpu,
)
from ...errors import GroupStartError, TPRuntimeError
from ...wire.exchange import Exchange
from ...wire.transport import Channel, wait
from .. import failures
from ..poll import Poll
from .environment import compile_caches, inherited_environment
from .fork_client import MAX_ANSWER_BYTES, ForkServer, ForkServerError, fork_server
from .group_folder import GroupFolder
from .launcher import Rank, check_system_calls, end_ranks, tail_of_file

END_TIMEOUT_S = 1.0  # a rank's stream ends a moment before the process does
STATUS_TIMEOUT_S = 5.0  # and its exit status comes a moment after that

_ENVIRONMENT = {
    # The group never leaves this machine: its sockets bind to the loopback device only.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # These two are for the fork server: numpy's import starts no threads, and whether there is a
    # GPU is asked of the driver's management library, which leaves CUDA as it is.
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@dataclass
class LocalRank:
    """One running rank of this machine, a child of its fork server."""

    index: int
    channel: Channel
    pid: int
    death_fd: int  # a pidfd
    status: socket.socket  # where the fork server tells how the process has ended
    server: ForkServer
    log_path: Path
    mirrored: bool = False
    clock_ahead_s: float = 0.0

    @property
    def place(self) -> str:
        return f"process {self.pid}"

    def ended(self, timeout_s: float) -> bool:
        return bool(wait([self.death_fd], timeout_s))

    def describe_exit(self) -> str:
        if not self.ended(END_TIMEOUT_S):
            return "closed its connection"
        if not wait([self.status], STATUS_TIMEOUT_S):
            return "ended"  # the fork server has not got around to it, and has other groups' ranks
        if packet := self.status.recv(MAX_ANSWER_BYTES, socket.MSG_PEEK):
            exitcode = msgspec.json.decode(packet, type=int | None)
            return "ended" if exitcode is None else reasons.how_ended(exitcode)
        server = f"its fork server (process {self.server.pid})"
        return f"ended with {server}, which {self.server.describe_exit()}"

    def log_tail(self) -> str:
        return tail_of_file(self.log_path)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            try:
                signal.pidfd_send_signal(self.death_fd, signal.SIGKILL)
            except OSError:  # a sandbox refuses it; the number is the process's while that lives
                if not self.ended(0):
                    os.kill(self.pid, signal.SIGKILL)

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
        check_system_calls()
        try:
            self._folder = GroupFolder.create()
            self._server = _running_server(config, poll)
        except BaseException:
            self.clean_up(keep_logs=False)
            raise

    def launch(self, config: GroupConfig, exchange: Exchange, poll: Poll) -> Sequence[Rank]:
        ranks: list[Rank] = []
        try:
            with contextlib.ExitStack() as shared:
                # Where torch's ranks meet: like all that they share, without a name and on no disk.
                rendezvous_fd = _new_memory("tp-runtime-rendezvous", shared)
                # For what ranks with the same part of a model keep in the host's memory.
                several = config.num_ranks > config.tp_size
                names = [f"tp-runtime-part-{part}" for part in range(config.tp_size) if several]
                part_fds = [_new_memory(name, shared) for name in names]
                for index in range(config.num_ranks):
                    poll()
                    fds = exchange.fd, rendezvous_fd, *part_fds[index % config.tp_size :][:1]
                    ranks.append(self._launch_rank(config, index, *fds))
        except BaseException as error:
            end_ranks(ranks, grace_s=0)
            self.clean_up(keep_logs=False)
            what = f"No process could be started for a rank of {config.num_ranks}:"
            if isinstance(error, ForkServerError):
                assert self._server is not None, "prepare comes first"
                log = self._server.log_tail()
                sentence = failures.advised(f"{what} the fork server {error}.", f"{error} {log}")
                raise GroupStartError(f"{sentence} Its log ends:\n{log}") from error
            if isinstance(error, OSError):
                raise GroupStartError(f"{what} {reasons.of(error)}") from error
            raise
        return ranks

    def _launch_rank(
        self,
        config: GroupConfig,
        index: int,
        exchange_fd: int,
        rendezvous_fd: int,
        *part_fd: int,
    ) -> LocalRank:
        assert self._folder is not None, "prepare comes first"
        assert self._server is not None, "prepare comes first"
        folder, server = self._folder.path, self._server
        worker = WorkerConfig(
            rank=index,
            local_rank=cuda_index(index),
            tp_size=config.tp_size,
            sequence_size=config.sequence_size,
            batch_groups=config.batch_groups,
            device=config.device,
            num_threads=max(1, machine.cores() // config.num_ranks),
            log_level=log_level(),
            fault_file=fault_file(),
            attention=config.attention,
            kernel_choices=os.fsencode(home() / "kernel_choices.jsonl"),
        )
        log_path = folder / f"rank{index}.log"
        # For appending, so that the rank can shorten it; readable by its owner only.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        channel, rank_end = Channel.pair()
        with contextlib.ExitStack() as on_error, rank_end:
            on_error.callback(channel.close)
            with open(os.open(log_path, flags, 0o600), "ab") as log:
                fds = (rank_end.fileno(), exchange_fd, log.fileno(), rendezvous_fd, *part_fd)
                forked = server.fork(worker, _rank_environment(config), fds)
            on_error.pop_all()
        return LocalRank(index, channel, *forked, server, log_path)

    def clean_up(self, keep_logs: bool) -> None:
        if self._folder is not None:
            self._folder.release(keep_logs)
            self._folder = None


def _new_memory(name: str, on_exit: contextlib.ExitStack) -> int:
    """A file in memory, which this process closes in the end."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    on_exit.callback(os.close, fd)
    return fd


def prepare_start(python: str, *, keep: bool = False) -> None:
    """Have what ranks are forked from import in the background, so that a group starts sooner.

    ``keep``: that process stays until this one ends. Returns at once and raises nothing: the start
    of a group says what is wrong.
    """
    with contextlib.suppress(OSError, TPRuntimeError):
        fork_server(python, _server_environment(), keep=keep)


def _running_server(config: GroupConfig, poll: Poll) -> ForkServer:
    """A fork server that is up: that of an earlier group, or a new one. Raises GroupStartError."""
    began = time.monotonic()
    while True:
        try:
            server = fork_server(config.python, _server_environment())
            server.wait_until_up(poll, config.start_timeout_s)
            return server
        except OSError as error:
            raise failures.no_python(config, error) from error
        except ForkServerError as error:
            if server.started_at >= began:
                raise failures.no_fork_server(config, error, server.log_tail()) from error
            # One that was there has ended since: it had no rank for long, or was killed.


def _environment() -> dict[str, str]:
    """What the environments of the fork server and of all ranks have in common."""
    return compile_caches() | inherited_environment() | _ENVIRONMENT


def _server_environment() -> dict[str, str]:
    """The environment of the fork server: it sees no GPU, so that no import initialises one.

    vLLM's does ask CUDA for them (vllm/platforms/cuda.py, 0.26). A rank that was forked after a
    vain question can ask again.
    """
    return _environment() | {"CUDA_VISIBLE_DEVICES": ""}


def _rank_environment(config: GroupConfig) -> dict[str, str]:
    """The environment of a rank: it sees the GPUs of its group only."""
    environment = _environment()
    if config.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        gpus = dict.fromkeys(map(cuda_index, config.devices))
        chosen = [names[gpu] if names else str(gpu) for gpu in gpus]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        if ranks_on_one_gpu():
            environment["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    return environment
