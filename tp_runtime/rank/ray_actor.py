"""A rank as an actor of Ray: finds out where it is, connects to the engine, and is a rank.

Imported by Ray's worker processes, and by ``ray_driver``. Its two methods are called once each.
"""

import os
import socket
import time

import msgspec
import psutil
import ray

from .. import machine
from ..wire.handshake import Member, join
from ..wire.ray_messages import Run, Seat

CONNECT_TIMEOUT_S = 30.0


class RankActor:
    """One rank. Its process is the rank's, and ends with it."""

    def __init__(self) -> None:
        self._host = ray.util.get_node_ip_address()
        # Bound for as long as the rank lives and never listened to, so that nobody else is given
        # the port; torch's store can bind it, too, and listens.
        self._rendezvous = socket.socket()
        self._rendezvous.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._rendezvous.bind((self._host, 0))

    def seat(self) -> Seat:
        """Where this rank is."""
        context = ray.get_runtime_context()
        return Seat(
            node=context.get_node_id(),
            host=self._host,
            port=self._rendezvous.getsockname()[1],
            gpus=context.get_accelerator_ids().get("GPU", []),
        )

    def run(self, order: Run, gpus: list[str], num_local_ranks: int, shares_host: bool) -> None:
        """Be a rank until the engine has no more use for it.

        ``gpus``: of all ranks on this host, in their order. ``shares_host``: with the engine.
        """
        self._set_environment(order, gpus)
        exchange_fd = _attach(*order.exchange) if shares_host else None
        mirrored = exchange_fd is None
        if exchange_fd is None:
            exchange_fd = os.memfd_create("tp-runtime-mirror", os.MFD_CLOEXEC)
        stream = _connect(order, mirrored)
        from . import worker  # which may import vLLM: it reads its environment then

        worker.run(
            msgspec.structs.replace(
                order.worker,
                control_fd=stream.detach(),
                exchange_fd=exchange_fd,
                mirrored=mirrored,
                num_threads=max(1, machine.cores() // num_local_ranks),
            ),
            parent_pid=os.getppid(),
        )

    def _set_environment(self, order: Run, gpus: list[str]) -> None:
        for name, value in order.environment.items():
            os.environ.setdefault(name, value)
        interface = _interface_of(self._host)
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
        os.environ["VLLM_HOST_IP"] = self._host
        if gpus:
            # Ray shows each actor its own GPU only; memory can be shared between those shown.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def _attach(pid: int, fd: int, device: int, inode: int) -> int | None:
    """The engine's exchange memory, or None where its process cannot be seen from here."""
    try:
        attached = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # in a container of its own
        return None
    found = os.fstat(attached)
    if (found.st_dev, found.st_ino) != (device, inode):
        os.close(attached)
        return None
    return attached


def _connect(order: Run, mirrored: bool) -> socket.socket:
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        member = Member(order.worker.rank, os.getpid(), mirrored, time.monotonic())
        try:
            return join(order.address, order.token, member)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)  # too many strangers there, perhaps


def _interface_of(host: str) -> str:
    """The network interface that has this address."""
    addresses = psutil.net_if_addrs()
    for name, of_interface in addresses.items():
        if any(address.address == host for address in of_interface):
            return name
    # Any address of 127.0.0.0/8 is the loopback device's.
    if host.startswith("127."):
        return "lo"
    raise RuntimeError(f"No network interface here has Ray's address {host}: {sorted(addresses)}.")
