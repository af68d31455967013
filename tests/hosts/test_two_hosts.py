"""A group whose ranks are on two hosts: the numbers, and the way of the tensors."""

import os
from pathlib import Path

import psutil
import pytest
import torch
from hosts.conftest import ModelOn
from parity.conftest import FP32_TOLERANCE, relative_error
from process.conftest import make_inputs

from support.native import native_model
from support.ray_hosts import Cluster
from tp_runtime.client import Runtime

pytestmark = [pytest.mark.process, pytest.mark.hosts, pytest.mark.rotates(5, "ray")]


def memories_of(process: psutil.Process) -> set[str]:
    """The anonymous memories that a process has open, by name."""
    folder = Path(f"/proc/{process.pid}/fd")
    links = [os.readlink(folder / fd) for fd in os.listdir(folder)]  # noqa: PTH115, PTH208
    return {link.split()[0] for link in links if link.startswith("/memfd:tp-runtime")}


def test_the_numbers_are_comfyuis(
    cluster: Cluster, model_on: ModelOn, runtime: Runtime, tiny_z_image: Path
) -> None:
    model = model_on(2)
    model.ensure_loaded()
    native = native_model(tiny_z_image)
    for height, seed in ((16, 1), (16, 2), (24, 3)):
        inputs = make_inputs(height, seed=seed)
        with torch.inference_mode():
            expected = native(inputs["x"], inputs["timesteps"], inputs["context"], num_tokens=20)
        assert relative_error(model.evaluate(inputs), expected) <= FP32_TOLERANCE
    (report,) = runtime.reports()
    assert [rank["tp_world_size"] for rank in report.ranks] == [2, 2]


def test_tensors_cross_the_network(cluster: Cluster, model_on: ModelOn) -> None:
    """The far rank has a memory of its own; the near one has the engine's."""
    (near,), (far,) = (host.ranks() for host in cluster.hosts)
    assert memories_of(near) == {"/memfd:tp-runtime-exchange"}
    assert memories_of(far) == {"/memfd:tp-runtime-mirror"}
