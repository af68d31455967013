"""The driver process of Ray: what is left where it cannot be started."""

from pathlib import Path

import pytest

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
