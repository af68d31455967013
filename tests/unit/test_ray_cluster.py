"""The driver process of Ray, without Ray: what is left of it, what it says, and its log."""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.paths import REPOSITORY
from support.waiting import wait_until
from tp_runtime.client.launch import ray as ray_launcher
from tp_runtime.client.launch import ray_driver_client
from tp_runtime.client.launch.ray_driver_client import Driver, cluster_gpu_count
from tp_runtime.config import GroupConfig
from tp_runtime.errors import GroupStartError
from tp_runtime.wire.own_log import MAX_LOG_BYTES
from tp_runtime.wire.ray_messages import Placed, Seat, Waiting


def test_a_python_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_RUNTIME_HOME", str(tmp_path))

    made: list[Path] = []

    def mkdtemp(**names: str) -> str:
        folder = real_mkdtemp(**names)
        if names["prefix"] == "tp-ray-":
            made.append(Path(folder))
        return folder

    def left() -> tuple[set[str], list[Path]]:
        gc.collect()  # what other tests held
        files = {fd.name for fd in Path("/proc/self/fd").iterdir()}
        return files, [folder for folder in made if folder.exists()]

    real_mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(ray_driver_client.tempfile, "mkdtemp", mkdtemp)
    files, _ = left()
    for _ in range(3):
        with pytest.raises(GroupStartError, match="TP_RUNTIME_PYTHON"):
            cluster_gpu_count("127.0.0.1:1", "/no/such/python")
        with pytest.raises(
            GroupStartError, match="TP_RUNTIME_PYTHON to a Python that has ray, vllm"
        ):
            Driver(GroupConfig(1, "cpu", python="/no/such/python", where="ray"), 1, tmp_path)
    assert made
    files_after, folders = left()
    assert files_after <= files
    assert folders == []


IMPORTS = """
import sys
sys.path.insert(0, {!r})
"""


@pytest.fixture
def driver_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`driver_that(code)`: a Python in whose place a driver runs that code instead."""
    monkeypatch.setenv("TP_RUNTIME_HOME", str(tmp_path))

    def make(code: str) -> str:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\n{IMPORTS.format(str(REPOSITORY))}\n{code}\n")
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
    python = driver_that(f"open({str(asked)!r}, 'a').write('x'); sys.exit(3)")
    for _ in range(3):
        with pytest.raises(GroupStartError) as error:
            cluster_gpu_count("127.0.0.1:1", python)
        assert "3" in str(error.value)
    assert asked.read_text() == "x"
    monkeypatch.setattr(ray_driver_client, "FAILURE_S", 0)
    with pytest.raises(GroupStartError):
        cluster_gpu_count("127.0.0.1:1", python)
    assert asked.read_text() == "xx"


# Says that the cluster has as many GPUs as the file `asked` has characters, after one more.
COUNTS = """
import msgspec
from tp_runtime.wire.ray_messages import DriverConfig, Waiting
from tp_runtime.wire.transport import Channel, wait

with open({asked!r}, "a+") as asked:
    asked.write("x")
    asked.seek(0)
    count = len(asked.read())
told = msgspec.json.decode(sys.argv[-1], type=DriverConfig)
channel = Channel.inherited(told.control_fd)
channel.send(msgspec.msgpack.encode(Waiting(count, count)))
wait([channel], None)  # until whoever asked is gone
"""


def test_a_cluster_that_has_grown_is_counted_again(
    driver_that: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though no group on it has ended; whoever asks often is answered at once."""
    python = driver_that(COUNTS.format(asked=str(tmp_path / "asked")))
    assert [cluster_gpu_count("127.0.0.1:2", python) for _ in range(3)] == [1, 1, 1]
    monkeypatch.setattr(ray_driver_client, "COUNT_S", 0)
    assert cluster_gpu_count("127.0.0.1:2", python) == 2


LOGS = """
import msgspec
from tp_runtime.ray_driver.driver import Driver
from tp_runtime.wire.ray_messages import DriverConfig

driver = Driver(msgspec.json.decode(sys.argv[-1], type=DriverConfig))
print("x" * {size} + "the end", flush=True)
driver.gone.wait()
"""


def test_of_a_long_log_the_end_is_kept(driver_that: Callable[[str], str], tmp_path: Path) -> None:
    python = driver_that(LOGS.format(size=MAX_LOG_BYTES))
    config = GroupConfig(1, "cpu", python=python, where="ray", ray_address="127.0.0.1:1")
    driver = Driver(config, 1, tmp_path)
    log = driver.log_path
    try:
        wait_until(lambda: log.read_text().startswith("(what came before was too long)"))
    finally:
        driver.kill(patience_s=0)
    assert log.stat().st_size < MAX_LOG_BYTES // 2
    assert "the end" in log.read_text()


def test_a_rank_is_shown_the_gpus_of_all_ranks_on_its_host() -> None:
    """Also of those that are in other tensor-parallel groups, with which it may share tokens."""
    nodes = ["a", "a", "a", "b"]
    seats = [Seat(node, node, 1, [str(number)]) for number, node in enumerate(nodes)]
    assert [seat.gpus_of_host(seats) for seat in seats] == [*3 * [["0", "1", "2"]], ["3"]]
    assert Seat("a", "a", 1, []).gpus_of_host([]) == []


class _SlowCluster:
    """Stands in for a driver process: Ray takes two minutes to say that it has one GPU of two.

    It is the clock, too: each look at it takes ten seconds.
    """

    log_path = Path("driver.log")

    def __init__(self, joins_after_s: float) -> None:
        self._joins_after_s = joins_after_s
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def receive(self, _: float) -> list[Waiting | Placed]:
        self.now += 10
        since_s = self.now - 1120
        if since_s >= self._joins_after_s:
            return [Placed("127.0.0.1", ["127.0.0.1"] * 2)]
        return [Waiting(1, 1)] if since_s >= 0 else []


def test_hosts_may_join_for_a_while_however_long_ray_takes_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = GroupConfig(2, "cuda", where="ray", ray_address="10.0.0.1:6379", start_timeout_s=600)
    for joins_after_s in (20, 40):
        cluster: Any = _SlowCluster(joins_after_s)
        monkeypatch.setattr(ray_launcher, "time", cluster)
        if joins_after_s < ray_launcher.JOIN_TIMEOUT_S:
            assert isinstance(ray_launcher._placed(config, cluster, lambda: None), Placed)
            continue
        with pytest.raises(GroupStartError, match=r"has 1, 1 of them free, and had no more for 30"):
            ray_launcher._placed(config, cluster, lambda: None)
        assert cluster.now == 1120 + ray_launcher.JOIN_TIMEOUT_S
