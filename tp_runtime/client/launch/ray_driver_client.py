"""The driver process of a group on Ray, seen from ComfyUI's process; and what a cluster has.

ComfyUI's process never imports ray: the driver (``ray_driver/driver.py``) does, with the runtime's
Python.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import msgspec
import psutil

from ... import reasons
from ...config import PACKAGE, GroupConfig
from ...errors import GroupStartError
from ...wire.handshake import new_token
from ...wire.ray_messages import DriverConfig, Ended, FromDriver, Refused, Run, Waiting
from ...wire.transport import Channel, wait
from .. import failures
from ..poll import POLL_S, Poll, acquired
from .environment import code_that_runs, inherited_environment
from .group_folder import GroupFolder
from .launcher import tail_of_file

END_TIMEOUT_S = 15.0
ASK_TIMEOUT_S, ASK_END_S = 60.0, 3.0
# How long an answer of a cluster stands. Asking takes a second, and the page does so often.
COUNT_S, FAILURE_S = 30.0, 10.0


class Driver:
    """The driver process of one group, seen from the engine. It ends when ``close`` is called."""

    def __init__(self, config: GroupConfig, num_ranks: int, folder: Path) -> None:
        """Start it, with its log in ``folder``. Raises GroupStartError: there is no such Python."""
        self.log_path = folder / "driver.log"
        self.ended_ranks: dict[int, str] = {}  # rank → how, as Ray puts it
        self._channel, theirs = Channel.pair()
        # Not in the group's folder: the path of a socket has at most 107 characters.
        self._ray_folder = (
            "" if config.ray_address else tempfile.mkdtemp(prefix="tp-ray-", dir="/tmp")
        )
        with theirs:
            driver = DriverConfig(
                control_fd=theirs.fileno(),
                address=config.ray_address,
                ray_folder=self._ray_folder,
                package=str(PACKAGE),
                num_ranks=num_ranks,
                device=config.device,
            )
            code = code_that_runs("tp_runtime.ray_driver.driver")
            arguments = ["-c", code, msgspec.json.encode(driver).decode()]
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            try:
                with open(os.open(self.log_path, flags, 0o600), "ab") as log:
                    self.process = subprocess.Popen(
                        [config.python, *arguments],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=_environment(config),
                        cwd=folder,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,
                    )
            except OSError as error:
                self._channel.close()
                self._remove_ray_folder()
                raise failures.no_python(config, error) from error

    def receive(self, timeout_s: float) -> list[FromDriver]:
        """What the driver has said, after at most so long.

        Raises:
            GroupStartError: it has ended, or says why it does.
        """
        wait([self._channel], timeout_s)
        messages: list[FromDriver] = [
            msgspec.msgpack.decode(frame, type=FromDriver) for frame in self._channel.receive()
        ]
        for message in messages:
            if isinstance(message, Refused):
                raise GroupStartError(message.message)
            if isinstance(message, Ended):
                self.ended_ranks[message.rank] = message.why
        if self._channel.ended:
            how = reasons.how_ended(self.process.wait()) if self.ended(1.0) else "hung up"
            tail = tail_of_file(self.log_path)
            raise GroupStartError(
                f"The driver process for Ray {how}. {reasons.advice(tail)} "
                f"Its log {self.log_path} ends:\n{tail}"
            )
        return messages

    def send(self, order: Run) -> None:
        with contextlib.suppress(EOFError):  # it has ended: `receive` says how
            self._channel.send(msgspec.msgpack.encode(order))

    def how_ended(self, rank: int, timeout_s: float) -> str:
        """How a rank ended; empty if the driver does not know after so long."""
        deadline = time.monotonic() + timeout_s
        while rank not in self.ended_ranks and (left := deadline - time.monotonic()) > 0:
            try:
                self.receive(left)
            except GroupStartError:
                break
        return self.ended_ranks.get(rank, "")

    def ended(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most so long. All ranks have, then."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Have the driver end its job. Does not wait. Idempotent."""
        self._channel.close()

    def kill(self, patience_s: float = END_TIMEOUT_S) -> None:
        """Leave nothing of it, after it was given its time. Idempotent."""
        self.close()
        if not self.ended(patience_s):
            self.process.kill()
            self.process.wait()
        if self._ray_folder:
            _end_session(self.process.pid)
        self._remove_ray_folder()

    def _remove_ray_folder(self) -> None:
        if self._ray_folder:
            shutil.rmtree(self._ray_folder, ignore_errors=True)


def _end_session(leader: int) -> None:
    """Kill a session's processes: Ray's agents stay for a minute after their driver was killed."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)


_gpu_counts: dict[str, tuple[float, int]] = {}  # by the cluster's address: when, and how many
_failures: dict[tuple[str, str], tuple[float, str]] = {}  # by address and Python: when, and what
_asking = threading.Lock()


def cluster_gpu_count(address: str, python: str, poll: Poll | None = None) -> int:
    """GPUs of the Ray cluster at ``address``.

    One thread asks a cluster at a time. What it answers stands for ``COUNT_S``, since hosts may
    join, or until ``forget_count``; that it does not, for ``FAILURE_S``, so that whoever waited for
    that answer does not wait again.

    Raises:
        GroupStartError: the cluster cannot be reached, or the Python has no ray.
    """
    with acquired(_asking, poll):
        counted_at, count = _gpu_counts.get(address, (-math.inf, 0))
        if time.monotonic() - counted_at < COUNT_S:
            return count
        failed_at, message = _failures.get((address, python), (-math.inf, ""))
        if time.monotonic() - failed_at < FAILURE_S:
            raise GroupStartError(message)
        try:
            count = _ask(address, python, poll)
        except GroupStartError as error:
            _failures[address, python] = time.monotonic(), str(error)
            raise
        _gpu_counts[address] = time.monotonic(), count
        return count


def forget_count(address: str) -> None:
    """Ask the cluster the next time: it may have changed."""
    _gpu_counts.pop(address, None)


def _ask(address: str, python: str, poll: Poll | None) -> int:
    folder = GroupFolder.create()
    config = GroupConfig(1, "cuda", python=python, where="ray", ray_address=address)
    answer: Waiting | None = None
    with contextlib.ExitStack() as at_end:
        at_end.callback(lambda: folder.release(keep=answer is None))
        with failures.on_ray():
            driver = Driver(config, 0, folder.path)
        at_end.callback(driver.kill, ASK_END_S)  # it has no ranks that it would have to end
        deadline = time.monotonic() + ASK_TIMEOUT_S
        while answer is None and time.monotonic() < deadline:
            if poll is not None:
                poll()
            for message in driver.receive(POLL_S):
                if isinstance(message, Waiting):
                    answer = message
    if answer is None:
        raise GroupStartError(
            f"The Ray cluster at {address} did not answer for {ASK_TIMEOUT_S:g} s. "
            f"Its log: {driver.log_path}"
        )
    return answer.total


def _environment(config: GroupConfig) -> dict[str, str]:
    environment = inherited_environment() | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }
    if not config.ray_address:
        # A secret of its own; Ray would leave one in the user's home.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": new_token().hex()}
        environment["RAY_raylet_start_wait_time_s"] = str(math.ceil(config.start_timeout_s))
        environment["RAY_worker_niceness"] = "0"  # else 15: ranks would wait for everybody
    return environment
