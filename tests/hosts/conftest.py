"""Clusters of two hosts, and groups on them; the tests work on the first host."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.conftest import faults
from process.conftest import home

from support.paths import LIGHT_SITE
from support.ray_hosts import Cluster, why_not, working_on
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime

__all__ = ["faults", "home"]

ModelOn = Callable[..., RemoteModel]


@contextlib.contextmanager
def cluster_of(slots: tuple[int, int], *, light: bool = False) -> Iterator[Cluster]:
    """Hosts with so much room each; the test's network is the first one's.

    With `light`, the ranks compute nothing (see `light_rank`).
    """
    if reason := why_not():
        pytest.skip(reason)
    environment = {"PYTHONPATH": str(LIGHT_SITE)} if light else {}
    with Cluster(slots, environment) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        with working_on(cluster.hosts[0]):
            yield cluster


def ray_group(cluster: Cluster, tp_size: int, **settings: Any) -> GroupConfig:
    """Settings of a group on the cluster, with bounds that a test can wait for."""
    bounds = {"start_timeout_s": 120.0, "call_timeout_s": 120.0}
    where = {"where": "ray", "ray_address": cluster.address}
    return GroupConfig(tp_size, "cpu", **{**bounds, **where, **settings})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two hosts with room for one rank each."""
    with cluster_of((1, 1)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def runtime(cluster: Cluster) -> Iterator[Runtime]:
    runtime = Runtime()
    yield runtime
    runtime.release()


@pytest.fixture(scope="module")
def model_on(runtime: Runtime, cluster: Cluster, tiny_z_image: Path) -> ModelOn:
    """`model_on(tp_size, **settings)`: a tiny Z-Image on that many ranks of the cluster."""

    def make(tp_size: int, **settings: Any) -> RemoteModel:
        spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
        return runtime.model(spec, ray_group(cluster, tp_size, **settings))

    return make
