"""Ranks as actors of a Ray cluster: the second ``Launcher``. Part of the engine's half.

This process never imports ray. It starts a driver process (``ray_driver``), listens until every
rank has connected and shown that it knows the group's token, and then listens no longer.
"""

import logging
import math
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .config import GroupConfig, WorkerConfig, fault_file, log_level
from .errors import GroupClosedError, GroupStartError
from .group_folder import GroupFolder
from .handshake import Reception, new_token
from .launcher import RANK_ENVIRONMENT, Rank, inherited_environment
from .ray_messages import DriverConfig, Ended, FromDriver, Placed, Refused, Run, Waiting
from .tensors import Exchange
from .transport import SILENCE_S, Channel, wait

logger = logging.getLogger("tp_runtime")

POLL_S = 0.1
END_TIMEOUT_S = 15.0
# A cluster with too few GPUs in all is given so long for a host to join, or to come back.
JOIN_TIMEOUT_S = 30.0

_PACKAGE = Path(__file__).resolve().parent


class Driver:
    """The driver process of one group, seen from the engine. It ends when ``close`` is called."""

    def __init__(self, config: GroupConfig, num_ranks: int, folder: Path) -> None:
        self.log_path = folder / "driver.log"
        self.ended: dict[int, str] = {}  # rank → how, as Ray puts it
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
                package=str(_PACKAGE),
                num_ranks=num_ranks,
                device=config.device,
            )
            arguments = ["-m", f"{_PACKAGE.name}.ray_driver", msgspec.json.encode(driver).decode()]
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
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
                self.ended[message.rank] = message.why
        if self._channel.ended:
            raise GroupStartError(f"The driver process for Ray has ended. Its log: {self.log_path}")
        return messages

    def send(self, order: Run) -> None:
        self._channel.send(msgspec.msgpack.encode(order))

    def how_ended(self, rank: int, timeout_s: float) -> str:
        """How a rank ended; empty if the driver does not know after so long."""
        deadline = time.monotonic() + timeout_s
        while rank not in self.ended and (left := deadline - time.monotonic()) > 0:
            try:
                self.receive(left)
            except GroupStartError:
                break
        return self.ended.get(rank, "")

    def close(self) -> None:
        """Have the driver end its job. Does not wait. Idempotent."""
        self._channel.close()

    def kill(self) -> None:
        """Leave nothing of it, after it was given its time. Idempotent."""
        self.close()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._ray_folder:
            shutil.rmtree(self._ray_folder, ignore_errors=True)


@dataclass
class RayRank(Rank):
    """A rank somewhere in a Ray cluster. ``process`` is the driver's: they end together."""

    driver: Driver | None = None
    host: str = ""
    remote_pid: int = 0

    @property
    def pid(self) -> int:
        return self.remote_pid

    @property
    def place(self) -> str:
        return f"process {self.pid} on {self.host}"

    def kill(self) -> None:
        assert self.driver is not None
        self.driver.close()

    def describe_exit(self) -> str:
        assert self.driver is not None
        if self.channel.cut_off:
            return (
                f"was not heard of for {SILENCE_S} s: its host is down, or cut off from the network"
            )
        why = self.driver.how_ended(self.index, timeout_s=1.0)
        return f"ended ({why})" if why else "closed its connection"


class RayLauncher:
    """Ranks as actors of the cluster that the configuration names, or of one started here."""

    def __init__(self) -> None:
        self._folder: GroupFolder | None = None
        self._driver: Driver | None = None

    def launch(
        self, config: GroupConfig, exchange: Exchange, given_up: Callable[[], bool]
    ) -> list[Rank]:
        try:
            self._folder = GroupFolder.create()
            self._driver = driver = Driver(config, config.tp_size, self._folder.path)
            placed = _placed(config, driver, given_up)
            return _connected(config, driver, placed, exchange, given_up)
        except BaseException as error:
            self.clean_up(keep_logs=isinstance(error, GroupStartError))
            if isinstance(error, OSError):
                raise GroupStartError(
                    f"The ranks could not be started on Ray with {config.python!r}: {error}."
                ) from error
            raise

    def clean_up(self, keep_logs: bool) -> None:
        if self._driver is not None:
            self._driver.kill()
            self._driver = None
        if self._folder is not None:
            self._folder.release(keep_logs)
            self._folder = None


def _placed(config: GroupConfig, driver: Driver, given_up: Callable[[], bool]) -> Placed:
    """Where the ranks are, once Ray has room for all of them."""
    unit = "GPUs" if config.device == "cuda" else "CPU cores"
    began = time.monotonic()
    found: Waiting | None = None
    while True:
        _check_wanted(given_up)
        for message in driver.receive(POLL_S):
            if isinstance(message, Placed):
                return message
            if isinstance(message, Waiting):
                found = message
                logger.info(
                    "waiting for %d %s; the cluster has %d free", config.tp_size, unit, found.free
                )
        lacking = found is not None and found.total < config.tp_size
        timeout_s = min(JOIN_TIMEOUT_S if lacking else math.inf, config.start_timeout_s)
        if time.monotonic() - began < timeout_s:
            continue
        place = (
            f"The Ray cluster at {config.ray_address}"
            if config.ray_address
            else "Ray on this machine"
        )
        if found is None:
            raise GroupStartError(
                f"{place} did not answer for {timeout_s:g} s. The log: {driver.log_path}"
            )
        raise GroupStartError(
            f"{place} has {found.total} {unit}, {found.free} of them free; {config.tp_size} were "
            f"asked for and waited for {timeout_s:g} s. Choose a smaller gpu_count, add hosts, or "
            "wait for others to finish."
        )


def _connected(
    config: GroupConfig,
    driver: Driver,
    placed: Placed,
    exchange: Exchange,
    given_up: Callable[[], bool],
) -> list[Rank]:
    """The ranks, each with a stream to it."""
    token = new_token()
    reception = Reception(placed.address, token, config.tp_size)
    try:
        driver.send(_order(config, reception.address, token, exchange))
        deadline = time.monotonic() + config.start_timeout_s
        while not reception.complete():
            _check_wanted(given_up)
            reception.receive(POLL_S)
            driver.receive(0)
            if driver.ended:
                lost, why = next(iter(driver.ended.items()))
                raise GroupStartError(
                    f"Rank {lost} on {placed.hosts[lost]} ended before it had connected ({why}). "
                    f"The log: {driver.log_path}"
                )
            if time.monotonic() > deadline:
                silent = sorted(set(range(config.tp_size)) - set(reception.members))
                raise GroupStartError(
                    f"Ranks {silent} on {sorted({placed.hosts[rank] for rank in silent})} have not "
                    f"connected to {reception.address} for {config.start_timeout_s:g} s. Is that "
                    f"address reachable from there? The log: {driver.log_path}"
                )
    except BaseException:
        for _, _, stream in reception.members.values():
            stream.close()
        raise
    finally:
        reception.close()
    ranks: list[Rank] = []
    for index, (member, heard_s, stream) in sorted(reception.members.items()):
        rank = RayRank(
            index=index,
            channel=Channel(stream),
            process=driver.process,
            death_fd=os.pidfd_open(driver.process.pid),
            log_path=driver.log_path,
            mirrored=member.mirrored,
            clock_ahead_s=member.time_s - heard_s,
            driver=driver,
            host=placed.hosts[index],
            remote_pid=member.pid,
        )
        logger.info(
            "rank %d is %s; its tensors go by %s",
            index,
            rank.place,
            "TCP" if rank.mirrored else "shared memory",
        )
        ranks.append(rank)
    return ranks


def _order(config: GroupConfig, address: tuple[str, int], token: bytes, exchange: Exchange) -> Run:
    memory = os.fstat(exchange.fd)
    worker = WorkerConfig(
        rank=-1,  # this and what else is -1 differs between the ranks
        local_rank=-1,
        tp_size=config.tp_size,
        device=config.device,
        control_fd=-1,
        exchange_fd=-1,
        rendezvous="",
        num_threads=1,
        log_level=log_level(),
        fault_file=fault_file(),
    )
    environment = {**RANK_ENVIRONMENT, "VLLM_LOGGING_LEVEL": log_level()}
    return Run(
        address,
        token,
        (os.getpid(), exchange.fd, memory.st_dev, memory.st_ino),
        worker,
        environment,
    )


def _check_wanted(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise GroupClosedError("The process group was closed before it had started.")


def _environment(config: GroupConfig) -> dict[str, str]:
    environment = inherited_environment() | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
    }
    if not config.ray_address:
        # A secret of its own; Ray would leave one in the user's home.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": new_token().hex()}
    return environment
