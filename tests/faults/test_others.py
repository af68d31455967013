"""What can go wrong around ranks: sockets, memory, disks, files, a machine that stands still."""

import ctypes
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import msgspec
import pytest
import torch
from faults.cases import FILE_S, Case, case
from faults.conftest import Observe, put
from process.conftest import TESTS, PythonWith, assert_ended, cpu_group, make_inputs

from support.native import native_model
from support.paths import REPOSITORY
from support.tiny_models import write_tiny
from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime import machine
from tp_runtime.client import (
    CallTimeoutError,
    CheckpointError,
    GroupConfig,
    GroupDiedError,
    ModelSpec,
    ProtocolError,
    RankError,
    RankMemoryError,
    RemoteModel,
    Runtime,
    TPRuntimeError,
    evaluation_times,
)
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State
from tp_runtime.client.launch.local import LocalRank
from tp_runtime.wire.own_log import MAX_LOG_BYTES
from tp_runtime.wire.protocol import MAX_FRAME_BYTES, VERSION, Done, encode

pytestmark = [pytest.mark.process, pytest.mark.rotates(2)]


@pytest.fixture(scope="module")
def python(python_with: PythonWith) -> str:
    return python_with()


@pytest.fixture(scope="module")
def model(python: str, tiny_z_image: Path) -> Iterator[RemoteModel]:
    """A model on two ranks that compute nothing."""
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    yield runtime.model(spec, cpu_group(2, python=python))
    runtime.release()


def engine_of(model: RemoteModel) -> Engine:
    engine = model._group.engine
    assert engine is not None
    return engine


def ordered(**order: Any) -> dict[str, Any]:
    return make_inputs() | {"transformer_options": order}


def works(model: RemoteModel) -> None:
    model.ensure_loaded()
    inputs = make_inputs(seed=5)
    assert torch.equal(model.evaluate(inputs), inputs["x"] * 2 + inputs["context"].sum())


@contextmanager
def timed(observe: Observe, row: Case) -> Iterator[None]:
    began = time.monotonic()
    yield
    observe(row, time.monotonic() - began)


@contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """This process may have less of something."""
    before, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (before, hard))


# --- memory and disks ----------------------------------------------------------------------------


def test_no_file_descriptor_is_left(model: RemoteModel, observe: Observe) -> None:
    model._group.close()
    with timed(observe, case("start", "no file descriptor is left")):
        with limited(resource.RLIMIT_NOFILE, 3):
            with pytest.raises(TPRuntimeError, match=r"no shared memory .*ulimit -n"):
                model.ensure_loaded()
    works(model)


def test_no_shared_memory_is_left(model: RemoteModel, observe: Observe) -> None:
    """The group is as before: nothing was sent."""
    works(model)
    engine = engine_of(model)
    with timed(observe, case("evaluate", "no shared memory is left")):
        with limited(resource.RLIMIT_FSIZE, engine._sender.exchange.size):
            with pytest.raises(TPRuntimeError, match="bytes of shared memory are not to be had"):
                model.evaluate(make_inputs(512))
    works(model)
    assert engine_of(model) is engine


def test_the_container_has_no_memory_left(
    model: RemoteModel, observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the host has: Linux would end the rank, or ComfyUI, that asks for more."""
    works(model)
    engine = engine_of(model)
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(2**30, 2**20))
    inputs = make_inputs(512)
    with timed(observe, case("evaluate", "the container has no memory left")):
        with pytest.raises(TPRuntimeError, match=r"fewer than that are free.*container"):
            model.evaluate(inputs)
    monkeypatch.undo()
    works(model)
    assert engine_of(model) is engine


FULL_DISK = "import os; full = os.open('/dev/full', 1); os.dup2(full, 1); os.dup2(full, 2)"


def test_the_disk_of_the_logs_is_full(
    python_with: PythonWith, tiny_z_image: Path, observe: Observe
) -> None:
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    model = runtime.model(spec, cpu_group(1, python=python_with(FULL_DISK)))
    with timed(observe, case("start", "the disk of the logs is full")):
        works(model)
    runtime.release()


def test_a_rank_logs_without_end(model: RemoteModel, observe: Observe) -> None:
    """Only the end of the log is kept."""
    works(model)
    log = engine_of(model).ranks[0].log_path
    text = "x" * (MAX_LOG_BYTES + 2**20)
    with timed(observe, case("evaluate", "a rank logs without end")):
        for part in range(0, len(text), 4 * 2**20):
            model.evaluate(ordered(rank=0, print=text[part : part + 4 * 2**20]))
        model.evaluate(ordered(rank=0, print="the end"))
        wait_until(lambda: log.stat().st_size < MAX_LOG_BYTES // 2, within_s=bound_s(5))
    assert log.read_text().startswith("(what came before was too long)")
    assert "the end" in engine_of(model).ranks[0].log_tail()


# --- frames --------------------------------------------------------------------------------------


def framed(frame: bytes) -> bytes:
    return struct.pack(">I", len(frame)) + frame


def of_version(number: int) -> bytes:
    body = msgspec.Raw(msgspec.msgpack.encode(Done(1)))
    return framed(msgspec.msgpack.encode({"version": number, "body": body}))


FRAMES = {
    "a rank sends garbage": (framed(os.urandom(64)), "malformed frame of 64 bytes"),
    "a rank sends a frame of another version": (of_version(VERSION + 1), f"version {VERSION + 1}"),
    "a rank sends a frame that is too long": (
        struct.pack(">I", MAX_FRAME_BYTES + 1),
        f"at most {MAX_FRAME_BYTES} fit",
    ),
    "a rank sends an answer twice": (framed(encode(Done(1))), "that nothing had asked for"),
}


@pytest.mark.parametrize("fault", FRAMES)
def test_a_rank_sends_what_it_must_not(
    model: RemoteModel, observe: Observe, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    works(model)
    engine = engine_of(model)
    frame, words = FRAMES[fault]
    with timed(observe, case("evaluate", fault)):
        with pytest.raises(ProtocolError, match=words):
            model.evaluate(ordered(rank=1, send=frame))
    assert engine.state is State.FAILED
    assert words in caplog.text
    works(model)


def test_a_rank_receives_garbage(model: RemoteModel, observe: Observe) -> None:
    works(model)
    engine = engine_of(model)
    with timed(observe, case("idle", "a rank receives garbage")):
        engine.ranks[0].channel._stream.sendall(framed(b"garbage"))
        wait_until(lambda: engine.state is State.FAILED)
    assert type(engine.error) is RankError
    assert "Rank 0 raised ProtocolError: A malformed frame of 7" in str(engine.error)
    works(model)


def test_a_socket_is_lost(model: RemoteModel, observe: Observe) -> None:
    works(model)
    engine = engine_of(model)
    with ThreadPoolExecutor(1) as pool, timed(observe, case("evaluate", "a rank's socket is lost")):
        evaluating = pool.submit(model.evaluate, ordered(sleep_s=20))
        wait_until(lambda: engine.state is State.BUSY)
        time.sleep(0.2)  # what has not reached every rank would be done on a new group
        engine.ranks[1].channel._stream.shutdown(socket.SHUT_RDWR)
        error = evaluating.exception(timeout=10)
    assert type(error) is GroupDiedError
    assert "Rank 1 " in str(error)
    works(model)


# --- deaths that nobody has seen yet -------------------------------------------------------------


@pytest.mark.parametrize("what", ["ensure_loaded", "evaluate"])
def test_a_request_comes_right_after_a_death(
    model: RemoteModel, observe: Observe, what: str
) -> None:
    """It is carried out on a new group, and its caller hears of nothing."""
    works(model)
    engine = engine_of(model)
    rank = engine.ranks[1]
    with engine.processes._state._lock:  # the owner cannot tell anybody
        rank.kill()
        assert rank.ended(timeout_s=5.0)
        assert engine.state is State.READY
    with timed(observe, case("idle", "a rank dies, and a request comes at once")):
        if what == "evaluate":
            inputs = make_inputs(seed=6)
            expected = inputs["x"] * 2 + inputs["context"].sum()
            assert torch.equal(model.evaluate(inputs), expected)
        else:
            works(model)
    assert engine_of(model) is not engine


def test_a_hang_is_noticed_by_the_models_own_step_time(
    model: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the time-out of a request, which is 60 s here."""
    monkeypatch.setattr(evaluation_times, "FLOOR_S", 1.0)
    works(model)
    for _ in range(evaluation_times.FIRST_EVALUATIONS + 1):
        model.evaluate(make_inputs())
    os.kill(engine_of(model).ranks[1].pid, SIGSTOP)
    began = time.monotonic()
    with pytest.raises(CallTimeoutError, match=r"Ranks \[1\] gave no sign of life"):
        model.evaluate(make_inputs())
    assert time.monotonic() - began < 30
    works(model)


# --- the machine stands still --------------------------------------------------------------------

CLIENT = """
import sys
sys.path[:0] = {paths!r}
from process.conftest import cpu_group, make_inputs
from tp_runtime.client import ModelSpec, Runtime

config = cpu_group(2, python={python!r}, call_timeout_s=4.0)
model = Runtime().model(ModelSpec.of({file!r}, "float32", "float32"), config)
model.ensure_loaded()
print(*[rank.pid for rank in model._group.engine.ranks], flush=True)
inputs = make_inputs() | {{"transformer_options": {{"sleep_s": 2.0}}}}
result = model.evaluate(inputs)
print((result == inputs["x"] * 2 + inputs["context"].sum()).all().item(), flush=True)
"""


def test_the_machine_stands_still(python: str, tiny_z_image: Path, observe: Observe) -> None:
    """As in a suspended virtual machine: no process runs, and the clock does."""
    code = CLIENT.format(paths=[str(REPOSITORY), str(TESTS)], python=python, file=str(tiny_z_image))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        pids = [client.pid, *map(int, client.stdout.readline().split())]
        assert len(pids) == 3
        time.sleep(0.5)
        for pid in pids:
            os.kill(pid, SIGSTOP)
        time.sleep(8.0)
        with timed(observe, case("evaluate", "the machine stands still")):
            for pid in pids:
                os.kill(pid, SIGCONT)
                time.sleep(0.5)
            assert client.stdout.readline() == "True\n"


# --- model files, and memory, on real ranks ------------------------------------------------------


@pytest.fixture(scope="module")
def real(faults: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteModel]:
    """A model on one real rank, and its own file."""
    path = write_tiny("z_image", tmp_path_factory.mktemp("file") / "model.safetensors")
    runtime = Runtime()
    yield runtime.model(ModelSpec.of(str(path), "float32", "float32"), cpu_group(1))
    runtime.release()


def chosen_again(model: RemoteModel) -> RemoteModel:
    """As the loader does when the prompt is queued: the file as it is now."""
    return RemoteModel(
        ModelSpec.of(model.spec.path, "float32", "float32"), model._group, model._records
    )


def same_as_native(model: RemoteModel) -> None:
    inputs = make_inputs(seed=1)
    with torch.inference_mode():
        expected = native_model(Path(model.spec.path))(
            inputs["x"], inputs["timesteps"], inputs["context"], num_tokens=20
        )
    model.ensure_loaded()
    assert (model.evaluate(inputs) - expected).norm() / expected.norm() < 2e-6


@contextmanager
def while_it_loads(model: RemoteModel, faults: Path, change: Callable[[], None]) -> Iterator[Any]:
    """Yields the error that the load ends in when the file is changed in the middle of it."""
    put(faults, rank=0, point="read", action="delay", delay_s=2.0)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(model.ensure_loaded)
        wait_until(lambda: not faults.exists())
        change()
        yield loading.exception(timeout=FILE_S + 10)


def test_files_that_change(real: RemoteModel, faults: Path, observe: Observe) -> None:
    path = Path(real.spec.path)
    same_as_native(real)
    group = engine_of(real)
    residency = real._group._residency
    assert residency is not None
    residency._models.clear()
    group.unload(real.name)

    write_tiny("z_image", path.with_suffix(".new"), seed=1).rename(path)
    with timed(observe, case("load", "the file was replaced before")):
        with pytest.raises(CheckpointError, match="replaced after the model had been chosen"):
            real.ensure_loaded()
    model = chosen_again(real)
    same_as_native(model)
    assert engine_of(model) is group

    os.utime(path)
    model = chosen_again(real)
    model._group.start()
    with timed(observe, case("load", "the file changes")):
        with while_it_loads(model, faults, lambda: os.utime(path)) as error:
            assert type(error) is RankError
            assert "was changed while it was read" in str(error)

    model = chosen_again(real)
    content = path.read_bytes()
    model._group.start()
    with timed(observe, case("load", "the file is cut short")):
        with while_it_loads(model, faults, lambda: os.truncate(path, 100_000)) as error:
            assert type(error) is GroupDiedError
            assert "signal 7 (a file that it was reading was cut short" in str(error)
    path.write_bytes(content)
    same_as_native(chosen_again(real))


@pytest.fixture(
    scope="module",
    params=[(2, {}), (1, {"batch_groups": 2}), (1, {"sequence_size": 2})],
    ids=["parts", "batch groups", "shared tokens"],
)
def on_two(
    request: pytest.FixtureRequest, faults: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RemoteModel]:
    """A model on two real ranks, most of it in the host's memory, in each layout."""
    path = write_tiny("z_image", tmp_path_factory.mktemp("file") / "model.safetensors")
    tp_size, sizes = request.param
    limit = int(0.6 * path.stat().st_size / tp_size)
    config = cpu_group(tp_size, **sizes, gpu_memory=limit)
    runtime = Runtime()
    model = runtime.model(ModelSpec.of(str(path), "float32", "float32"), config)
    model._group.start()
    yield model
    runtime.release()


def test_one_rank_alone_refuses_a_file(on_two: RemoteModel, faults: Path, observe: Observe) -> None:
    """The others would wait for it where they take memory for what all of them have once."""
    group = engine_of(on_two)
    for rank in (1, 0):
        put(faults, rank=rank, point="load", action="refuse")
        with timed(observe, case("load", "one rank alone refuses the file")):
            with pytest.raises(CheckpointError, match=r"^a refusal at 'load', as a test asked$"):
                on_two.ensure_loaded()
        assert not faults.exists()
    same_as_native(on_two)
    assert engine_of(on_two) is group
    residency = on_two._group._residency
    assert residency is not None
    assert min(residency.report()[on_two.name]["streamed"]) > 0


def test_one_rank_alone_cannot_read_a_file(
    on_two: RemoteModel, faults: Path, observe: Observe
) -> None:
    model = chosen_again(on_two)
    on_two._group.close()
    on_two._group.start()
    group = engine_of(model)
    put(faults, rank=0, point="read", action="refuse")
    with pytest.raises(RankError, match=r"Rank 0 raised .* 'Load': a refusal at 'read', as"):
        model.ensure_loaded()
    observe(
        case("load", "one rank alone cannot read the file"),
        time.monotonic() - float(faults.with_suffix(".at").read_text()),
    )
    assert_ended([rank.pid for rank in group.ranks], within_s=bound_s(0.5))
    same_as_native(model)


def test_memory_runs_out_in_mid_forward(faults: Path, tiny_z_image: Path) -> None:
    """One real rank raises; the other one waits for it in a collective."""
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    model = runtime.model(spec, cpu_group(2))
    model.ensure_loaded()
    put(faults, rank=1, point="compile", action="allocate")
    with pytest.raises(RankMemoryError, match=r"Rank 1 ran out of memory .* during 'Evaluate'"):
        model.evaluate(make_inputs())
    same_as_native(model)
    runtime.release()


_PIDFD_GETFD = 438  # the number of the system call


def cut_links(rank: LocalRank) -> int:
    """Shut down the sockets between a rank and others; how many there were."""
    cut = 0
    for file in Path(f"/proc/{rank.pid}/fd").iterdir():
        try:
            is_socket = str(file.readlink()).startswith("socket:")
        except FileNotFoundError:  # the rank has closed it meanwhile
            continue
        if not is_socket:
            continue
        fd = ctypes.CDLL(None, use_errno=True).syscall(
            _PIDFD_GETFD, rank.death_fd, int(file.name), 0
        )
        assert fd >= 0, os.strerror(ctypes.get_errno())
        with socket.socket(fileno=fd) as one, suppress(OSError):  # one that only listens
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername():
                one.shutdown(socket.SHUT_RDWR)
                cut += 1
    return cut


@pytest.mark.usefixtures("home")
def test_the_link_between_ranks_fails(tiny_z_image: Path) -> None:
    """Two share the tokens, and are in the middle of an evaluation."""
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    model = runtime.model(spec, GroupConfig(1, "cpu", sequence_size=2, call_timeout_s=60.0))
    model.ensure_loaded()
    # Their link is there from now on. Where it was cut in the first evaluation, both ranks once
    # waited in an exchange until the time of the request was over.
    model.evaluate(make_inputs())
    engine = engine_of(model)
    with ThreadPoolExecutor(1) as pool:
        evaluating = pool.submit(model.evaluate, make_inputs(256))
        wait_until(lambda: engine.state is State.BUSY)
        time.sleep(1.0)
        assert not evaluating.done()
        assert cut_links(engine.ranks[1])
        error = evaluating.exception(timeout=20)  # long before a time-out of the group's
    assert type(error) is RankError
    assert re.search(r"Rank [01] raised .* during 'Evaluate'", str(error))
    assert_ended([rank.pid for rank in engine.ranks], within_s=bound_s(1))
    same_as_native(model)
    assert engine_of(model) is not engine
    assert runtime.release() == 1
