"""Several groups on one cluster: Ray keeps the books, and whoever finds no room is told."""

import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from faults.conftest import put
from hosts.conftest import cluster_of, ray_group
from process.conftest import make_inputs

from support.ray_hosts import Cluster
from support.waiting import wait_until
from tp_runtime.client import GroupStartError, ModelSpec, RankError, RemoteModel, Runtime
from tp_runtime.client.launch import ray as ray_launcher
from tp_runtime.wire.handshake import Reception

pytestmark = [pytest.mark.process, pytest.mark.hosts, pytest.mark.rotates(5, "ray")]


class Interrupted(BaseException):
    """As ComfyUI's InterruptProcessingException is none of Exception's."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One host with room for four ranks, which compute nothing."""
    with cluster_of((4, 0), light=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def servers(cluster: Cluster) -> Iterator[list[Runtime]]:
    """What two ComfyUI servers have."""
    runtimes = [Runtime(), Runtime()]
    yield runtimes
    for runtime in runtimes:
        runtime.release()


def model_of(runtime: Runtime, cluster: Cluster, path: Path, **settings: float) -> RemoteModel:
    spec = ModelSpec.of(str(path), "float32", "float32")
    return runtime.model(spec, ray_group(cluster, 2, **settings))


def ranks_of(model: RemoteModel) -> list[int]:
    engine = model._group.engine
    assert engine is not None
    return [rank.pid for rank in engine.ranks]


def test_strangers_while_a_group_starts(
    servers: list[Runtime],
    cluster: Cluster,
    tiny_z_image: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are let out, the group comes together, and nobody listens afterwards."""
    strangers: list[socket.socket] = []

    class Beset(Reception):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            for words in (b"", struct.pack(">I", 2**32 - 1), b"x" * 1000):
                strangers.append(socket.create_connection(self.address))
                strangers[-1].sendall(words)

    monkeypatch.setattr(ray_launcher, "Reception", Beset)
    model = model_of(servers[0], cluster, tiny_z_image)
    model.ensure_loaded()
    model.evaluate(make_inputs())
    assert len(strangers) == 3
    assert caplog.text.count("refused a connection from 10.77.0.1") == 3
    listening = [
        connection.laddr
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert not listening
    for stranger in strangers:
        stranger.close()


def test_two_servers_and_no_room_for_a_third(
    servers: list[Runtime],
    cluster: Cluster,
    tiny_z_image: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="tp_runtime")
    one, other = (model_of(runtime, cluster, tiny_z_image) for runtime in servers)
    for model in (one, other):
        model.ensure_loaded()
    assert len({*ranks_of(one), *ranks_of(other)}) == 4
    first = one.evaluate(make_inputs(seed=1))
    assert first.equal(other.evaluate(make_inputs(seed=1)))

    third = Runtime()
    with pytest.raises(
        GroupStartError,
        match=r"2 CPU cores were asked for, but the Ray cluster at 10\.77\.0\.1:6379 has 4, "
        r"0 of them free, and had no more for 30 s",
    ):
        model_of(third, cluster, tiny_z_image, start_timeout_s=30.0).ensure_loaded()
    assert "waiting for 2 CPU cores; the cluster has 4, 0 of them free" in caplog.text

    waiting = model_of(third, cluster, tiny_z_image)
    caplog.clear()

    def give_way() -> None:
        wait_until(lambda: "waiting for 2" in caplog.text)
        servers[1].release()

    thread = threading.Thread(target=give_way)
    thread.start()
    waiting.ensure_loaded()
    thread.join()
    assert first.equal(waiting.evaluate(make_inputs(seed=1)))
    assert first.equal(one.evaluate(make_inputs(seed=1)))
    third.release()


def test_cancelled_while_it_waits(
    servers: list[Runtime],
    cluster: Cluster,
    tiny_z_image: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing of it is left, neither here nor in Ray's books."""
    caplog.set_level(logging.INFO, logger="tp_runtime")
    for runtime in servers:
        model_of(runtime, cluster, tiny_z_image).ensure_loaded()
    third = Runtime()

    def poll() -> None:
        if "waiting for 2" in caplog.text:
            raise Interrupted

    with pytest.raises(Interrupted):
        model_of(third, cluster, tiny_z_image).ensure_loaded(poll)
    servers[1].release()
    model_of(servers[1], cluster, tiny_z_image).ensure_loaded()
    assert len(cluster.hosts[0].ranks()) == 4


def test_a_rank_that_raises(
    faults: Path, servers: list[Runtime], cluster: Cluster, tiny_z_image: Path
) -> None:
    """The error names the log, which has the traceback; ranks of others are unharmed."""
    for runtime in servers:
        runtime.release()
    one, other = (model_of(runtime, cluster, tiny_z_image) for runtime in servers)
    one.ensure_loaded()
    other.ensure_loaded()
    put(faults, rank=1, point="evaluate", action="raise")
    with pytest.raises(RankError, match=r"Rank 1 raised RuntimeError during 'Evaluate'") as caught:
        one.evaluate(make_inputs())
    log = Path(str(caught.value).rpartition("Log: ")[2])
    assert "RuntimeError: a fault at 'evaluate', as a test asked" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    other.evaluate(make_inputs())
    one.ensure_loaded()
    one.evaluate(make_inputs())


def test_a_rank_that_is_killed(
    servers: list[Runtime], cluster: Cluster, tiny_z_image: Path
) -> None:
    """Between two prompts: the next one is carried out on new ranks."""
    model = model_of(servers[0], cluster, tiny_z_image)
    model.ensure_loaded()
    engine, before = model._group.engine, ranks_of(model)
    os.kill(before[1], 9)
    wait_until(lambda: engine is not None and not engine.is_up())
    model.ensure_loaded()
    model.evaluate(make_inputs())
    assert set(ranks_of(model)).isdisjoint(before)
