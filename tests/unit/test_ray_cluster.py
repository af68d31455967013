"""The driver process of Ray: what is left where it cannot be started."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tp_runtime.client.launch import ray_driver_client
from tp_runtime.client.launch.ray_driver_client import Driver, cluster_gpu_count
from tp_runtime.config import GroupConfig
from tp_runtime.errors import GroupStartError


def test_a_python_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_RUNTIME_HOME", str(tmp_path))

    def left() -> tuple[int, list[Path]]:
        return len(list(Path("/proc/self/fd").iterdir())), sorted(Path("/tmp").glob("tp-ray-*"))

    before = left()
    for _ in range(3):
        with pytest.raises(GroupStartError, match="TP_RUNTIME_PYTHON"):
            cluster_gpu_count("127.0.0.1:1", "/no/such/python")
        with pytest.raises(
            GroupStartError, match="TP_RUNTIME_PYTHON to a Python that has ray, vllm"
        ):
            Driver(GroupConfig(1, "cpu", python="/no/such/python", where="ray"), 1, tmp_path)
    assert left() == before


@pytest.fixture
def driver_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`driver_that(code)`: a Python in whose place a driver runs that code instead."""
    monkeypatch.setenv("TP_RUNTIME_HOME", str(tmp_path))

    def make(code: str) -> str:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\n{code}\n")
        script.chmod(0o700)
        return str(script)

    return make


def test_asking_a_cluster_that_is_silent_can_be_cancelled(
    driver_that: Callable[[str], str],
) -> None:
    python = driver_that("import time; time.sleep(600)")
    began = time.monotonic()

    def cancel() -> None:
        if time.monotonic() - began > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cluster_gpu_count("127.0.0.1:1", python, cancel)
    assert time.monotonic() - began < 10
    assert not [one for one in psutil.Process().children() if python in one.cmdline()]


def test_who_waits_for_a_failure_does_not_wait_again(
    driver_that: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    python = driver_that(f"import sys; open({str(asked)!r}, 'a').write('x'); sys.exit(3)")
    for _ in range(3):
        with pytest.raises(GroupStartError) as error:
            cluster_gpu_count("127.0.0.1:1", python)
        assert "3" in str(error.value)
    assert asked.read_text() == "x"
    monkeypatch.setattr(ray_driver_client, "FAILURE_S", 0)
    with pytest.raises(GroupStartError):
        cluster_gpu_count("127.0.0.1:1", python)
    assert asked.read_text() == "xx"
