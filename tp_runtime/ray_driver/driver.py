"""The process that speaks with Ray for one group: places its ranks, watches them, ends them.

``ray_launcher`` starts it, with a ``DriverConfig`` as the only argument, so that ComfyUI's process
never imports ray. It ends when the stream to its parent does, and with it the job and all actors;
a Ray that was started here ends, too.
"""

import contextlib
import logging
import os
import re
import select
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import msgspec

from ..wire.own_log import shorten_own_log
from ..wire.ray_messages import DriverConfig, Ended, FromDriver, Placed, Refused, Run, Seat, Waiting
from ..wire.transport import Channel, wait

logger = logging.getLogger("tp_runtime.ray_driver")

REQUIREMENT = "ray>=2.50,<3"  # the extra `ray` of pyproject.toml
POLL_S = 0.1
CONNECT_TIMEOUT_S = 5.0
PARENT_CHECK_S = 1.0
ROOM_S = 1.0  # how long Ray takes where there is room
LOGS_S = 0.7  # what the ranks wrote last takes a moment to come here
END_TIMEOUT_S = 8.0
# Ray takes 127.0.0.1 for a mistake and puts an address of the network in its place.
LOOPBACK = "127.0.0.2"
OBJECT_STORE_BYTES = 80 * 2**20  # near Ray's least: nothing of ours goes through it

_DEATH = re.compile(r"(?:actor is dead because|exit detail:)\s*(.+?)(?:\.\s|$)", re.MULTILINE)


class Driver:
    """The one of this process. ``gone`` is set as soon as nobody is left to work for."""

    def __init__(self, config: DriverConfig) -> None:
        self._config = config
        self._channel = Channel.inherited(config.control_fd)
        self.gone = threading.Event()
        threading.Thread(target=self._watch_parent, args=(os.getppid(),), daemon=True).start()

    def send(self, message: FromDriver) -> None:
        with contextlib.suppress(EOFError):  # then `gone` is about to be set
            self._channel.send(msgspec.msgpack.encode(message))

    def _watch_parent(self, parent_pid: int) -> None:
        """Thread: Ray's calls may be waiting for ever when the end comes."""
        stream = select.poll()
        stream.register(self._config.control_fd, select.POLLRDHUP | select.POLLHUP)
        while not stream.poll(1000 * PARENT_CHECK_S) and os.getppid() == parent_pid:
            shorten_own_log()
        logger.info("ending: nobody is left to work for")
        self.gone.set()
        time.sleep(END_TIMEOUT_S)
        logger.error("ending at once: Ray has taken longer than %g s", END_TIMEOUT_S)
        self._remove_folder()
        os._exit(1)  # Ray's reaper ends what was started here

    def _remove_folder(self) -> None:
        if self._config.ray_folder:
            shutil.rmtree(self._config.ray_folder, ignore_errors=True)

    @contextlib.contextmanager
    def cluster(self) -> Iterator[None]:
        """Be connected to Ray."""
        import ray

        config = self._config
        if config.address:
            _check_address(config.address)
        package = {"py_modules": [config.package]} if config.num_ranks else {}
        if config.address:
            options: dict[str, Any] = {"address": config.address}
        else:
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_node_ip_address": LOOPBACK,
                "_temp_dir": config.ray_folder,
            }
            if config.device == "cpu":
                options["num_cpus"] = config.num_ranks
        try:
            ray.init(runtime_env=package, **options)
            yield
        finally:
            ray.shutdown()
            self._remove_folder()
            logger.info("Ray is left")

    # --- what the cluster has --------------------------------------------------------------------

    def resources(self) -> Waiting:
        """GPUs, or cores where there are none to be asked for."""
        import ray

        name = "GPU" if self._config.device == "cuda" else "CPU"
        total, free = ray.cluster_resources(), ray.available_resources()
        return Waiting(int(total.get(name, 0)), int(free.get(name, 0)))

    # --- the ranks -------------------------------------------------------------------------------

    def place(self) -> list[Any]:
        """An actor for each rank, as soon as the cluster has room for all of them; [] if `gone`."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from ..rank.ray_actor import RankActor

        on_gpu = self._config.device == "cuda"
        bundle = {"GPU": 1} if on_gpu else {"CPU": 1}
        places = placement_group([bundle] * self._config.num_ranks, strategy="PACK")
        said = None
        while not places.wait(POLL_S if said else ROOM_S):
            if self.gone.is_set():
                return []
            now = self.resources()
            if now != said:
                self.send(now)
                said = now
        actor = ray.remote(RankActor)
        return [
            actor.options(
                num_gpus=int(on_gpu),
                num_cpus=int(not on_gpu),
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(places, index),
            ).remote()
            for index in range(self._config.num_ranks)
        ]

    def serve(self, actors: list[Any]) -> None:
        """Have the actors be ranks, until all of them have ended or nobody wants them."""
        import ray

        waiting = [actor.seat.remote() for actor in actors]
        while len(ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)[0]) < len(waiting):
            if self.gone.is_set():
                return
        seats: list[Seat] = ray.get(waiting)
        ours = ray.get_runtime_context().get_node_id()
        # Those of one host together, and rank 0 on this one: it writes the result.
        ranks = sorted(
            zip(seats, actors, strict=True), key=lambda one: (one[0].node != ours, one[0].node)
        )
        seats = [seat for seat, _ in ranks]
        self.send(Placed(ray.util.get_node_ip_address(), [seat.host for seat in seats]))
        order = self._receive_order()
        if order is None:
            return
        on_node = Counter(seat.node for seat in seats)
        running = {}
        for index, (seat, actor) in enumerate(ranks):
            gpus = seat.gpus_of_host(seats)
            of_rank = msgspec.structs.replace(
                order.worker,
                rank=index,
                local_rank=gpus.index(seat.gpus[0]) if gpus else 0,
                rendezvous=f"tcp://{seats[0].host}:{seats[0].port}",
            )
            ref = actor.run.remote(
                msgspec.structs.replace(order, worker=of_rank),
                gpus,
                on_node[seat.node],
                seat.node == ours,
            )
            running[ref] = index
        while running and not self.gone.is_set():
            ended, _ = ray.wait(list(running), timeout=POLL_S)
            for ref in ended:
                self.send(Ended(running.pop(ref), _how_it_ended(ref)))
        for actor in actors:
            ray.kill(actor)
        logger.info("the ranks are ended")
        time.sleep(LOGS_S)

    def _receive_order(self) -> Run | None:
        while not self.gone.is_set():
            if wait([self._channel], POLL_S):
                for frame in self._channel.receive():
                    return msgspec.msgpack.decode(frame, type=Run)
        return None


def _check_address(address: str) -> None:
    """Raises ConnectionError if nobody listens there; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConnectionError(
            f"There is no Ray cluster at {address} ({error}). Start one (ray start --head), or "
            "correct the address."
        ) from error


def _how_it_ended(ref: Any) -> str:
    import ray

    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        logger.info("%s", error)
        found = _DEATH.findall(str(error))
        return ": ".join(found) or str(error)
    return "ended"


def main() -> None:
    """Serve the launcher that the command line describes."""
    config = msgspec.json.decode(sys.argv[1], type=DriverConfig)
    logging.basicConfig(level="INFO", format="%(asctime)s driver %(message)s")
    driver = Driver(config)
    if find_spec("ray") is None:
        driver.send(
            Refused(
                f"Ray is not installed in the runtime's Python {sys.executable}. Install it with: "
                f"{sys.executable} -m pip install '{REQUIREMENT}'"
            )
        )
        return
    try:
        with driver.cluster():
            if not config.num_ranks:
                driver.send(driver.resources())
            elif actors := driver.place():
                driver.serve(actors)
    except Exception as error:
        logger.exception("the group cannot be started")
        driver.send(Refused(f"Ray could not start the group ({type(error).__name__}): {error}"))
    # Whoever waits for this process need not wait for the tear-down of what it has imported, too.
    os._exit(0)


if __name__ == "__main__":
    main()
