"""A group that does not come up: one clear error in a bounded time, and no process left."""

import gc
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from process.conftest import PythonWith, assert_ended, cpu_group, prepare

from support.workers import bound_s
from tp_runtime.client import GroupClosedError, GroupLostError, GroupStartError, ModelSpec
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State
from tp_runtime.client.launch import ray as ray_launcher
from tp_runtime.client.launch.local import LocalLauncher
from tp_runtime.client.poll import Poll
from tp_runtime.client.runtime import Runtime
from tp_runtime.config import GroupConfig
from tp_runtime.wire.protocol import Report
from tp_runtime.wire.ray_messages import Placed

pytestmark = pytest.mark.process

LYING_RANK = """
import contextlib
from tp_runtime.rank import membership

@contextlib.contextmanager
def lie(worker):
    yield worker.tp_size - worker.rank

membership.tensor_parallel_group = lie
"""

RAISING_RANK = """
from tp_runtime.rank import membership

def refuse(worker):
    raise ValueError("no such device: text of the rank")

if config.rank == 1:
    membership.tensor_parallel_group = refuse
"""

ASLEEP = "import time; time.sleep(600)"


@pytest.fixture(scope="module")
def sleeper(python_with: PythonWith) -> str:
    """A Python whose ranks never come up."""
    return python_with(ASLEEP)


NO_VLLM = """
class NoVLLM:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError("No module named 'vllm'", name="vllm")

sys.meta_path.insert(0, NoVLLM())
"""


def failure_of(engine: Engine, within_s: float) -> str:
    """The message with which the start fails; checks that it leaves nothing."""
    began = time.monotonic()
    with pytest.raises(GroupStartError) as caught:
        engine.start()
    assert time.monotonic() - began < bound_s(within_s)
    assert engine.state is State.FAILED
    assert_ended([rank.pid for rank in engine.ranks], within_s=0)
    with pytest.raises(GroupLostError, match="has failed before"):
        engine.call(Report)
    engine.close()
    return str(caught.value)


def test_ranks_that_are_not_one_group_are_refused(python_with: PythonWith) -> None:
    message = failure_of(Engine(cpu_group(2, python=python_with(LYING_RANK))), within_s=60)
    assert "of tensor-parallel size 2 were asked for, but they see the sizes [2, 1]" in message


def test_a_rank_that_raises_names_itself(python_with: PythonWith) -> None:
    engine = Engine(cpu_group(2, python=python_with(RAISING_RANK)))
    message = failure_of(engine, within_s=60)
    assert "Rank 1 raised ValueError during 'start': no such device: text of the rank" in message
    assert str(engine.ranks[1].log_path) in message
    assert "Traceback" in engine.ranks[1].log_path.read_text()


def test_a_rank_that_ends_shows_its_log(python_with: PythonWith) -> None:
    python = python_with("if config.rank == 1: sys.exit('last words')")
    message = failure_of(Engine(cpu_group(2, python=python)), within_s=30)
    assert "Rank 1" in message
    assert "exited with status 1 during 'start'" in message
    assert message.endswith("last words")


def test_a_rank_that_is_killed_is_named(python_with: PythonWith) -> None:
    python = python_with("import os; config.rank == 1 and os.kill(os.getpid(), 9)")
    message = failure_of(Engine(cpu_group(2, python=python)), within_s=30)
    assert f"was killed by signal {int(signal.SIGKILL)} (by somebody, or by Linux" in message
    assert "during 'start'" in message


def test_a_silent_rank_is_given_up(sleeper: str) -> None:
    config = cpu_group(2, python=sleeper)
    prepare(config)
    message = failure_of(Engine(replace(config, start_timeout_s=5.0)), within_s=8)
    assert "Ranks [0, 1] gave no sign of life for 5 s during 'start'" in message


def test_an_import_that_never_ends_is_given_up(python_with: PythonWith) -> None:
    python = python_with(while_importing=ASLEEP)
    message = failure_of(Engine(cpu_group(2, python=python, start_timeout_s=1.0)), within_s=4)
    assert "that imports what the ranks need was not ready after 1 s" in message


def test_an_import_that_fails_shows_its_log(python_with: PythonWith) -> None:
    python = python_with(while_importing="raise OSError('libcudart.so.99: no such file')")
    message = failure_of(Engine(cpu_group(2, python=python)), within_s=60)
    assert "that imports what the ranks need exited with status 1" in message
    assert message.endswith("OSError: libcudart.so.99: no such file")


def test_an_import_that_crashes_is_named(python_with: PythonWith) -> None:
    python = python_with(while_importing="import os; os.kill(os.getpid(), 11)")
    message = failure_of(Engine(cpu_group(2, python=python)), within_s=60)
    assert "that imports what the ranks need was killed by signal 11" in message


def test_an_import_that_starts_a_thread_is_refused(python_with: PythonWith) -> None:
    start = "import threading, time; threading.Thread(target=time.sleep, args=[600]).start()"
    message = failure_of(Engine(cpu_group(2, python=python_with(while_importing=start))), 60)
    assert "has started threads" in message


def test_threads_of_the_driver_and_of_an_allocator_are_let_be(python_with: PythonWith) -> None:
    start = (
        "import threading, time\n"
        "named = threading.Event()\n"
        "def run():\n"
        "    open('/proc/thread-self/comm', 'w').write('jemalloc_bg_thd')\n"
        "    named.set()\n"
        "    time.sleep(600)\n"
        "threading.Thread(target=run, daemon=True).start()\n"
        "named.wait()"
    )
    engine = Engine(cpu_group(2, python=python_with(while_importing=start)))
    engine.start()
    try:
        assert engine.is_up()
    finally:
        engine.close()


def test_the_gpus_are_hidden_until_a_rank_starts(python_with: PythonWith) -> None:
    """An import that asks for them would leave every rank without."""
    look = "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == '', os.environ"
    engine = Engine(cpu_group(1, python=python_with(while_importing=look)))
    engine.start()
    engine.close()


def test_a_python_without_vllm_says_what_to_install(python_with: PythonWith) -> None:
    python = python_with(while_importing=NO_VLLM, light=False)
    message = failure_of(Engine(cpu_group(2, python=python)), within_s=60)
    assert "No module named 'vllm'" in message
    assert f"{python} -m pip install" in message
    assert "requirements-runtime.txt" in message
    assert "TP_RUNTIME_PYTHON" in message


def test_a_bare_python_says_what_to_install(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o700)
    message = failure_of(Engine(cpu_group(1, python=str(python))), within_s=30)
    assert "No module named 'msgspec'" in message
    assert "pip install" in message


@pytest.mark.parametrize("name", ["no/such/python", "."])
def test_a_python_that_cannot_be_started(name: str, tmp_path: Path, home: Path) -> None:
    before = set((home / "groups").glob("*"))
    message = failure_of(Engine(cpu_group(2, python=str(tmp_path / name))), within_s=2)
    assert f"{str(tmp_path / name)!r} could not be started" in message
    assert "TP_RUNTIME_PYTHON" in message
    assert set((home / "groups").glob("*")) == before


def test_a_failed_group_is_shown_while_somebody_holds_its_models(
    tiny_z_image: Path, tmp_path: Path
) -> None:
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32", "auto")
    model = runtime.model(spec, cpu_group(2, python=str(tmp_path / "no python")))
    with pytest.raises(GroupStartError):
        model.ensure_loaded()
    (failed,) = runtime.groups()
    assert failed.state == "failed"
    assert "could not be started" in (failed.error or "")
    assert failed.ready_ranks == 0
    del model
    gc.collect()
    assert runtime.groups() == runtime.reports() == []


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_RUNTIME_HOME", "/proc/nothing")
    message = failure_of(Engine(cpu_group(2)), within_s=2)
    assert "/proc/nothing/groups" in message
    assert "TP_RUNTIME_HOME" in message


class Interrupted(BaseException):
    """As ComfyUI's InterruptProcessingException is none of Exception's."""


def assert_cancelled_in_time(engine: Engine) -> None:
    """A start that would go on is over soon after the person has cancelled it."""
    ends = time.monotonic() + 0.5

    def poll() -> None:
        if time.monotonic() > ends:
            raise Interrupted

    with pytest.raises(Interrupted):
        engine.start(poll)
    assert time.monotonic() < ends + bound_s(1)
    assert engine.state is State.CLOSED


def test_a_start_is_cancelled_while_importing(python_with: PythonWith, home: Path) -> None:
    before = set((home / "groups").glob("*"))
    engine = Engine(cpu_group(2, python=python_with(while_importing=ASLEEP)))
    assert_cancelled_in_time(engine)
    assert set((home / "groups").glob("*")) == before


@pytest.mark.parametrize("error", [Interrupted, GroupStartError])
def test_a_cancelled_start_leaves_nothing(
    sleeper: str, error: type[BaseException], home: Path
) -> None:
    before = set((home / "groups").glob("*"))
    engine = Engine(cpu_group(2, python=sleeper))

    def poll() -> None:
        if engine.ranks:
            raise error

    with pytest.raises(error):
        engine.start(poll)
    assert engine.state is State.CLOSED
    assert_ended([rank.pid for rank in engine.ranks], within_s=0)
    assert set((home / "groups").glob("*")) == before


@pytest.mark.parametrize("when", ["at once", "when the ranks run"])
def test_close_from_another_thread_ends_a_start(sleeper: str, when: str) -> None:
    engine = Engine(cpu_group(2, python=sleeper))

    def wait_and_close() -> None:
        while when == "when the ranks run" and not engine.ranks:
            time.sleep(0.01)
        engine.close()

    closer = in_thread(wait_and_close)
    with pytest.raises(GroupClosedError):
        engine.start()
    closer.join()
    assert engine.state is State.CLOSED
    assert_ended([rank.pid for rank in engine.ranks], within_s=0)


def test_who_starts_a_group_cleans_up_after_it(python_with: PythonWith, home: Path) -> None:
    """Whoever closes it meanwhile only waits: two would close the same file descriptor."""
    cleaners: list[threading.Thread] = []
    preparing = threading.Event()

    class Watched(LocalLauncher):
        def prepare(self, config: GroupConfig, poll: Poll) -> None:
            preparing.set()
            super().prepare(config, poll)

        def clean_up(self, keep_logs: bool) -> None:
            cleaners.append(threading.current_thread())
            super().clean_up(keep_logs)

    before = set((home / "groups").glob("*"))
    engine = Engine(cpu_group(2, python=python_with(while_importing=ASLEEP)), Watched())
    closer = in_thread(lambda: (preparing.wait(), engine.close()))
    with pytest.raises(GroupClosedError):
        engine.start()
    closer.join()
    assert set(cleaners) == {threading.current_thread()}
    assert engine.state is State.CLOSED
    assert set((home / "groups").glob("*")) == before


def test_a_start_is_cancelled_while_its_ranks_on_ray_connect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Silent:
        """Stands in for a driver process whose ranks cannot reach this host."""

        log_path = tmp_path / "driver.log"
        ended_ranks: ClassVar[dict[int, str]] = {}

        def __init__(self, *_: object) -> None: ...
        def receive(self, _: float) -> list[Placed]:
            return [Placed("127.0.0.1", ["10.9.9.9"])]

        def send(self, _: object) -> None: ...
        def kill(self) -> None: ...

    monkeypatch.setattr(ray_launcher, "Driver", Silent)
    config = cpu_group(1, where="ray", ray_address="127.0.0.1:1", python=sys.executable)
    engine = Engine(config)
    assert_cancelled_in_time(engine)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_group_that_was_never_started() -> None:
    engine = Engine(cpu_group(2))
    with pytest.raises(GroupClosedError, match="never started"):
        engine.call(Report)
    engine.close()
    engine.close()
    with pytest.raises(GroupClosedError, match="closed before"):
        engine.start()
