"""Ranks as actors of a Ray cluster: the second ``Launcher``.

ComfyUI's process never imports ray. It starts a driver process (``ray_driver/driver.py``), listens
until every rank has connected and shown that it knows the group's token, and then no longer.
"""

import logging
import os
import time
from collections.abc import Sequence

from ...config import GroupConfig, WorkerConfig, fault_file, log_level
from ...errors import GroupStartError
from ...wire.exchange import Exchange
from ...wire.handshake import Member, Reception, new_token
from ...wire.ray_messages import Placed, Run, Waiting
from ...wire.transport import SILENCE_S, Channel
from .. import failures
from ..poll import POLL_S, Poll
from .environment import RANK_ENVIRONMENT
from .group_folder import GroupFolder
from .launcher import check_system_calls, tail_of_file
from .ray_driver_client import Driver, forget_count

logger = logging.getLogger("tp_runtime")

CONNECT_TIMEOUT_S = 60.0
# A cluster with too few GPUs in all is given so long for a host to join, or to come back.
JOIN_TIMEOUT_S = 30.0


class RayRank:
    """A rank somewhere in a Ray cluster."""

    def __init__(
        self, member: Member, host: str, channel: Channel, driver: Driver, clock_ahead_s: float
    ) -> None:
        self.index = member.rank
        self.pid = member.pid
        self.channel = channel
        self.mirrored = member.mirrored
        self.clock_ahead_s = clock_ahead_s
        self.log_path = driver.log_path
        self.death_fd = os.pidfd_open(driver.process.pid)  # the ranks end with it
        self.place = f"process {self.pid} on {host}"
        self._driver = driver

    def ended(self, timeout_s: float) -> bool:
        """Whether it has ended, and the driver with it."""
        return self._driver.ended(timeout_s)

    def describe_exit(self) -> str:
        if self.channel.cut_off:
            return (
                f"was not heard of for {SILENCE_S} s: its host is down, or cut off from the network"
            )
        if self._driver.ended(0):
            return "ended with the driver process of its group"
        why = self._driver.how_ended(self.index, timeout_s=1.0)
        return f"ended ({why})" if why else "closed its connection"

    def log_tail(self) -> str:
        return tail_of_file(self.log_path)

    def kill(self) -> None:
        self._driver.close()

    def release(self) -> None:
        self.channel.close()
        if self.death_fd >= 0:
            os.close(self.death_fd)
            self.death_fd = -1


class RayLauncher:
    """Ranks as actors of the cluster that the configuration names, or of one started here."""

    def __init__(self) -> None:
        self._address = ""
        self._folder: GroupFolder | None = None
        self._driver: Driver | None = None
        self._placed: Placed | None = None

    def prepare(self, config: GroupConfig, poll: Poll) -> None:
        check_system_calls()
        self._address = config.ray_address
        self._folder = GroupFolder.create()
        with failures.on_ray():
            self._driver = Driver(config, config.num_ranks, self._folder.path)
        self._placed = _placed(config, self._driver, poll)

    def launch(self, config: GroupConfig, exchange: Exchange, poll: Poll) -> Sequence[RayRank]:
        assert self._driver is not None, "not prepared"
        assert self._placed is not None, "not prepared"
        with failures.on_ray():
            return _connected(config, self._driver, self._placed, exchange, poll)

    def clean_up(self, keep_logs: bool) -> None:
        forget_count(self._address)
        if self._driver is not None:
            self._driver.kill()
            self._driver = None
        if self._folder is not None:
            self._folder.release(keep_logs)
            self._folder = None


def _placed(config: GroupConfig, driver: Driver, poll: Poll) -> Placed:
    """Where the ranks are, once Ray has room for all of them."""
    unit = "GPUs" if config.device == "cuda" else "CPU cores"
    began = time.monotonic()
    found: Waiting | None = None
    lacks_since: float | None = None
    while True:
        poll()
        for message in driver.receive(POLL_S):
            if isinstance(message, Placed):
                return message
            if isinstance(message, Waiting):
                found = message
                lacks = found.total < config.num_ranks
                lacks_since = (lacks_since or time.monotonic()) if lacks else None
                logger.info(
                    "waiting for %d %s; the cluster has %d, %d of them free",
                    *(config.num_ranks, unit, found.total, found.free),
                )
        now, timeout_s = time.monotonic(), config.start_timeout_s
        if now - began < timeout_s:
            if lacks_since is None or now - lacks_since < JOIN_TIMEOUT_S:
                continue
            timeout_s = JOIN_TIMEOUT_S
        cluster = f"cluster at {config.ray_address}" if config.ray_address else "of this machine"
        if found is None:
            raise GroupStartError(
                f"The Ray {cluster} has not started the ranks' processes for {timeout_s:g} s. "
                f"The log: {driver.log_path}"
            )
        raise GroupStartError(
            f"{config.num_ranks} {unit} were asked for, but the Ray {cluster} has {found.total}, "
            f"{found.free} of them free, and had no more for {timeout_s:g} s. Choose a smaller "
            "gpu_count, add hosts, or wait for others to finish."
        )


def _connected(
    config: GroupConfig, driver: Driver, placed: Placed, exchange: Exchange, poll: Poll
) -> Sequence[RayRank]:
    """The ranks, each with a stream to it."""
    token = new_token()
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    with Reception(placed.address, token, config.num_ranks) as reception:
        driver.send(_order(config, reception.address, token, exchange))
        while not reception.complete():
            poll()
            reception.receive(POLL_S)
            driver.receive(0)
            missing = set(range(config.num_ranks)) - set(reception.members)
            for index in missing & set(driver.ended_ranks):
                raise GroupStartError(
                    f"Rank {index} on {placed.hosts[index]} ended before it had connected "
                    f"({driver.ended_ranks[index]}). The log: {driver.log_path}"
                )
            if missing and time.monotonic() > deadline:
                hosts = sorted({placed.hosts[index] for index in missing})
                raise GroupStartError(
                    f"Ranks {sorted(missing)} on {hosts} have not connected to this host's "
                    f"{reception.address} for {CONNECT_TIMEOUT_S:g} s. Can it be reached from "
                    f"there? The log: {driver.log_path}"
                )
        members = reception.take()
    ranks = [
        RayRank(member, placed.hosts[member.rank], Channel(stream), driver, member.time_s - heard_s)
        for member, heard_s, stream in members
    ]
    for rank in ranks:
        way = "TCP" if rank.mirrored else "shared memory"
        logger.info("rank %d is %s; its tensors go by %s", rank.index, rank.place, way)
    return ranks


def _order(config: GroupConfig, address: tuple[str, int], token: bytes, exchange: Exchange) -> Run:
    memory = os.fstat(exchange.fd)
    worker = WorkerConfig(
        rank=-1,  # this and what else is -1 differs between the ranks
        local_rank=-1,
        tp_size=config.tp_size,
        sequence_size=config.sequence_size,
        batch_groups=config.batch_groups,
        device=config.device,
        control_fd=-1,
        exchange_fd=-1,
        num_threads=1,
        log_level=log_level(),
        fault_file=fault_file(),
        attention=config.attention,
    )
    environment = {**RANK_ENVIRONMENT, "VLLM_LOGGING_LEVEL": log_level()}
    return Run(
        address,
        token,
        (os.getpid(), exchange.fd, memory.st_dev, memory.st_ino),
        worker,
        environment,
    )
