"""Groups on a Ray that is started on this machine for them; it needs no root and no network."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from process.conftest import TESTS, make_inputs

from support.leaks import is_marked
from support.native import native_model
from support.paths import LIGHT_SITE, REPOSITORY
from support.ray_leaks import DRIVER_MARK, MARKS, no_ray_left_over
from support.waiting import wait_until
from tp_runtime.client import (
    CheckpointError,
    GroupConfig,
    GroupStartError,
    ModelSpec,
    Runtime,
    cluster_gpu_count,
)

pytestmark = [pytest.mark.process, pytest.mark.rotates(5, "ray")]

NOBODY = "127.0.0.1:1"  # tcpmux: nothing listens there
BOUND_S = 30.0


def on_ray(tp_size: int = 2, **settings: str) -> GroupConfig:
    return GroupConfig(
        tp_size, "cpu", start_timeout_s=300.0, call_timeout_s=60.0, where="ray", **settings
    )


def ray_processes() -> list[psutil.Process]:
    """Everything below this process that is Ray's, the driver included."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any(is_marked(process, mark) for mark in (*MARKS, DRIVER_MARK))
    ]


def test_a_group_and_what_it_leaves(home: Path, tiny_z_image: Path, tmp_path: Path) -> None:
    """ComfyUI's numbers; nobody but this machine is listened to; then nothing is left."""
    inputs = make_inputs()
    with torch.inference_mode():
        expected = native_model(tiny_z_image)(
            inputs["x"], inputs["timesteps"], inputs["context"], num_tokens=20
        )
    runtime = Runtime()
    with no_ray_left_over():
        spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
        model = runtime.model(spec, on_ray())
        model.ensure_loaded()
        found = model.evaluate(inputs)
        assert (found - expected).norm() / expected.norm() < 2e-6
        (report,) = runtime.reports()
        assert [rank["tp_world_size"] for rank in report.ranks] == [2, 2]
        assert [rank["mirrored"] for rank in report.ranks] == [False, False]
        addresses = {
            connection.laddr.ip
            for process in [psutil.Process(), *ray_processes()]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        print(f"listened on: {sorted(addresses)}")

        gone = tmp_path / "gone.safetensors"
        gone.write_bytes(tiny_z_image.read_bytes())
        lost = runtime.model(ModelSpec.of(str(gone), "float32", "float32"), on_ray())
        gone.unlink()
        with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
            lost.ensure_loaded()
        assert torch.equal(model.evaluate(inputs), found)
        runtime.release()
    assert not list((home / "groups").iterdir())


ENGINE = """
import sys, time
sys.path[:0] = {paths!r}
from process.test_local_ray import on_ray
from tp_runtime.client import ModelSpec, Runtime
model = Runtime().model(ModelSpec.of({file!r}, "float32", "float32"), on_ray(1))
model.ensure_loaded()
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that compute nothing."""
    monkeypatch.setenv("PYTHONPATH", str(LIGHT_SITE))


@pytest.mark.usefixtures("light")
def test_the_engine_is_killed(tiny_z_image: Path) -> None:
    """The driver ends the ranks, its Ray and their folder."""
    paths = [str(REPOSITORY), str(TESTS)]
    code = ENGINE.format(paths=paths, file=str(tiny_z_image))
    with (
        no_ray_left_over(within_s=BOUND_S),
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as engine,
    ):
        assert engine.stdout is not None
        assert engine.stdout.readline() == "up\n"
        assert ray_processes()
        os.kill(engine.pid, signal.SIGKILL)


@pytest.mark.usefixtures("light")
def test_the_driver_is_killed(tiny_z_image: Path) -> None:
    """A clear error for whoever was waiting, and nothing of its Ray is left."""
    runtime = Runtime()
    with no_ray_left_over(within_s=BOUND_S):
        spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
        model = runtime.model(spec, on_ray(1))
        model.ensure_loaded()
        (driver,) = [one for one in ray_processes() if is_marked(one, DRIVER_MARK)]
        driver.kill()
        engine = model._group.engine
        assert engine is not None
        wait_until(lambda: not engine.is_up())
        model.ensure_loaded()  # on a new group
        model.evaluate(make_inputs())
        runtime.release()


@pytest.fixture
def python_without_ray(tmp_path: Path) -> str:
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "sys.modules['ray'] = None\n"
        "del sys.argv[:2]\n"
        "exec(sys.argv[0])\n"
    )
    script.chmod(0o700)
    return str(script)


def start(config: GroupConfig, file: Path) -> None:
    Runtime().model(ModelSpec.of(str(file), "float32", "float32"), config).ensure_loaded()


def ask(config: GroupConfig, _file: Path) -> None:
    cluster_gpu_count(config.ray_address, config.python)


@pytest.mark.parametrize("use", [start, ask])
def test_ray_is_not_installed(
    python_without_ray: str, tiny_z_image: Path, use: Callable[[GroupConfig, Path], None]
) -> None:
    config = on_ray(python=python_without_ray, ray_address=NOBODY)
    with pytest.raises(
        GroupStartError,
        match=r"Ray is not installed in the runtime's Python \S+\. Install it with: "
        r"\S+ -m pip install 'ray>=\S+'",
    ):
        use(config, tiny_z_image)


@pytest.mark.parametrize("use", [start, ask])
def test_nobody_is_at_the_address(
    tiny_z_image: Path, use: Callable[[GroupConfig, Path], None]
) -> None:
    began = time.monotonic()
    with pytest.raises(GroupStartError, match=f"no Ray cluster at {NOBODY}"):
        use(on_ray(ray_address=NOBODY), tiny_z_image)
    assert time.monotonic() - began < 60.0
