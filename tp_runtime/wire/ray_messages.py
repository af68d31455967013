"""What the launcher for Ray and its driver process say to each other, over a socket pair.

::

    launcher                       driver (imports ray)              actors, one per rank
       │── start ────────────────────►│
       │◄─ Waiting (any number) ──────┤  while the cluster has too few free GPUs
       │◄─ Placed ────────────────────┤── place ──────────────────────────►│
       │── Run ──────────────────────►│── run ────────────────────────────►│
       │◄════════════════ each rank connects, proves itself, serves ═══════╡
       │◄─ Ended (each rank) ─────────┤
       │── end of the stream ────────►│── end of the job ─────────────────►│

The launcher is ``client/launch/ray.py``, the driver ``ray_driver/driver.py`` and an actor
``rank/ray_actor.py``.
"""

from collections.abc import Iterable, Mapping

import msgspec

from ..config import WorkerConfig


class DriverConfig(msgspec.Struct, frozen=True):
    """What the driver is told at its start; on its command line as JSON.

    ``address``: the cluster's; empty: start one here, in ``ray_folder``. ``package``: the folder of
    this package. ``num_ranks`` 0: only say what the cluster has.
    """

    control_fd: int
    address: str
    ray_folder: str
    package: str
    num_ranks: int
    device: str


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """The cluster has ``total`` GPUs (or CPU cores), ``free`` of them."""

    total: int
    free: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The driver is ending: why, for a person."""

    message: str


class Placed(msgspec.Struct, frozen=True, tag=True):
    """Every rank has its place. ``hosts``: their addresses; ``address``: the engine's node's."""

    address: str
    hosts: list[str]


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A rank's process has ended, as Ray puts it."""

    rank: int
    why: str


FromDriver = Waiting | Refused | Placed | Ended


class Run(msgspec.Struct, frozen=True):
    """Be the ranks, and connect to the engine at ``address``.

    ``worker``: what is the same for all of them. ``exchange``: the engine's process, the number of
    the descriptor there, and device and inode behind it, for the ranks of the engine's host.
    """

    address: tuple[str, int]
    token: bytes
    exchange: tuple[int, int, int, int]
    worker: WorkerConfig
    environment: Mapping[str, str]


class Seat(msgspec.Struct, frozen=True):
    """Where an actor finds itself. ``port``: a free one there. ``gpus``: as CUDA names them."""

    node: str
    host: str
    port: int
    gpus: list[str]

    def gpus_of_host(self, seats: Iterable["Seat"]) -> list[str]:
        """Those of all ranks on the same host, in the order of the ``seats``.

        A rank is shown them, so that it knows with whom it can share memory.
        """
        return [gpu for other in seats if other.node == self.node for gpu in other.gpus]
