"""Faults while a group is up: each ends in a clear error within a bound, and the next call works.

The ranks compute nothing here, except where a fault in the middle of a collective matters.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from process.conftest import PythonWith, assert_ended, cpu_group, evaluations_may_take, make_inputs

from support.native import native_model
from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime.client import (
    CallTimeoutError,
    GroupClosedError,
    GroupDiedError,
    InputError,
    ModelSpec,
    ProtocolError,
    RankError,
    RemoteModel,
    Runtime,
    hearing,
    rank_processes,
)
from tp_runtime.client import engine as engine_module
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State
from tp_runtime.wire.protocol import Load, Report, Unload

pytestmark = pytest.mark.process

LightModel = Callable[..., RemoteModel]


@pytest.fixture(scope="module", params=["asleep", "awake"])
def light_model(
    request: pytest.FixtureRequest, python_with: PythonWith, tiny_z_image: Path
) -> Iterator[LightModel]:
    """`light_model(**settings)`: a model on 2 ranks that compute nothing; one group a settings.

    After an evaluation the ranks sleep, or stay awake for a while, as those on GPUs do.
    """
    code = ""
    if request.param == "awake":
        code = "requests = worker._requests; worker._requests = lambda a, _, b: requests(a, 0.3, b)"
    runtime, python = Runtime(), python_with(code)

    def make(**settings: Any) -> RemoteModel:
        spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
        model = runtime.model(spec, cpu_group(2, python=python, **settings))
        model.ensure_loaded()
        return model

    yield make
    runtime.release()


def engine_of(model: RemoteModel) -> Engine:
    engine = model._group.engine
    assert engine is not None
    return engine


def ordered(**order: Any) -> dict[str, Any]:
    return make_inputs() | {"transformer_options": order}


def assert_works(model: RemoteModel) -> None:
    """The next request works, on a new group if the last one has ended."""
    model.ensure_loaded()
    inputs = make_inputs(seed=5)
    assert torch.equal(model.evaluate(inputs), inputs["x"] * 2 + inputs["context"].sum())


@contextmanager
def in_background(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def has_ended(engine: Engine) -> bool:
    """Whether the thread that owns the ranks has seen to their end."""
    owner = engine.processes._owner
    return owner is not None and not owner.is_alive()


@contextmanager
def ends_the_group(model: RemoteModel, within_s: float) -> Iterator[None]:
    """The body brings all ranks down in time; their logs stay."""
    engine = engine_of(model)
    began = time.monotonic()
    yield
    assert time.monotonic() - began < bound_s(within_s)
    assert engine.state is State.FAILED
    assert_ended([rank.pid for rank in engine.ranks], within_s=0)
    assert all(rank.log_path.exists() for rank in engine.ranks)


def test_a_rank_is_killed_in_the_middle_of_a_collective(tiny_z_image: Path) -> None:
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    model = runtime.model(spec, cpu_group())
    model.ensure_loaded()
    engine = engine_of(model)
    with in_background(lambda: model.evaluate(make_inputs(256))) as evaluating:
        time.sleep(1)
        assert not evaluating.done()
        with ends_the_group(model, within_s=1):
            os.kill(engine.ranks[1].pid, signal.SIGKILL)
            error = evaluating.exception(timeout=10)
    assert isinstance(error, GroupDiedError)
    assert f"Rank 1 (process {engine.ranks[1].pid}) was killed by signal 9" in str(error)
    assert "during 'Evaluate'" in str(error)
    assert str(engine.ranks[1].log_path) in str(error)
    assert model.loaded_bytes() == [0, 0]

    model.ensure_loaded()
    inputs = make_inputs(seed=1)
    with torch.inference_mode():
        expected = native_model(tiny_z_image)(
            inputs["x"], inputs["timesteps"], inputs["context"], num_tokens=20
        )
    assert (model.evaluate(inputs) - expected).norm() / expected.norm() < 2e-6
    assert runtime.release() == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed_while_idle(light_model: LightModel, rank: int) -> None:
    model = light_model()
    engine = engine_of(model)
    with ends_the_group(model, within_s=1):
        os.kill(engine.ranks[rank].pid, signal.SIGKILL)
        wait_until(lambda: has_ended(engine), within_s=10.0)
    assert isinstance(engine.error, GroupDiedError)
    assert f"Rank {rank} " in str(engine.error)
    assert "during" not in str(engine.error)
    assert_works(model)


def test_a_stopped_rank_is_given_up(light_model: LightModel) -> None:
    model = light_model()
    os.kill(engine_of(model).ranks[1].pid, signal.SIGSTOP)
    with evaluations_may_take(2.0), ends_the_group(model, within_s=3):
        with pytest.raises(CallTimeoutError, match=r"Ranks \[1\] gave no sign of life for 2 s"):
            model.evaluate(make_inputs())
    assert_works(model)


def test_a_stopped_rank_cannot_block_a_long_message(light_model: LightModel) -> None:
    model = light_model()
    os.kill(engine_of(model).ranks[0].pid, signal.SIGSTOP)
    with evaluations_may_take(2.0), ends_the_group(model, within_s=3):
        with pytest.raises(CallTimeoutError):
            model.evaluate(ordered(text="x" * 4 * 2**20))
    assert_works(model)


def test_a_rank_raises(light_model: LightModel) -> None:
    model = light_model()
    engine = engine_of(model)
    with ends_the_group(model, within_s=2):
        with pytest.raises(
            RankError, match="Rank 1 raised RuntimeError during 'Evaluate': the text"
        ):
            model.evaluate(ordered(rank=1, **{"raise": "the text"}))
    assert "RuntimeError: the text" in engine.ranks[1].log_path.read_text()
    assert_works(model)


def test_a_rank_exits(light_model: LightModel) -> None:
    model = light_model()
    with ends_the_group(model, within_s=2):
        with pytest.raises(GroupDiedError, match=r"Rank 0 .* exited with status 3 during"):
            model.evaluate(ordered(rank=0, exit=3))
    assert_works(model)


def test_the_cause_is_blamed_where_its_consequence_is_seen_first(
    light_model: LightModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank dies, and before that is seen another one says that its collective has failed."""
    monkeypatch.setattr(hearing, "CAUSE_S", 30.0)
    model = light_model()
    engine = engine_of(model)
    order = ordered(rank=1, **{"raise": "connection closed by peer"})
    with in_background(lambda: model.evaluate(order)) as evaluating:
        wait_until(lambda: 1 in engine.processes._hearing.evidence.last_words, within_s=10.0)
        assert not evaluating.done()
        engine.ranks[0].kill()
        error = evaluating.exception(timeout=10)
    assert type(error) is GroupDiedError
    assert "Rank 0 " in str(error)
    assert_works(model)


def test_one_rank_refuses_what_another_does(light_model: LightModel) -> None:
    model = light_model()
    with ends_the_group(model, within_s=2):
        with pytest.raises(ProtocolError, match="Some ranks refused"):
            model.evaluate(ordered(rank=0, refuse="only I"))
    assert_works(model)


def test_all_ranks_refuse(light_model: LightModel) -> None:
    model = light_model()
    engine = engine_of(model)
    with pytest.raises(InputError, match=r"^no$"):
        model.evaluate(ordered(refuse="no"))
    assert_works(model)
    assert engine_of(model) is engine


def test_a_load_that_was_given_up_is_freed_before_the_next(
    light_model: LightModel, tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    model = light_model()
    group = model._group
    bf16 = ModelSpec.of(str(tiny_z_image), "bfloat16", "float32")
    abandoned = RemoteModel(bf16, group, model._records)
    with pytest.raises(Interrupted):
        abandoned.ensure_loaded(poll=interrupt)
    name = abandoned.name
    del abandoned
    requests: list[Any] = []
    plain = engine_module.encode
    monkeypatch.setattr(engine_module, "encode", lambda m: requests.append(m) or plain(m))
    other = RemoteModel(
        ModelSpec.of(str(tiny_z_image), "float16", "float32"), group, model._records
    )
    other.ensure_loaded()
    of_models = [request for request in requests if hasattr(request, "model")]
    assert [(type(request), request.model) for request in of_models] == [
        (Unload, name),
        (Load, other.name),
    ]
    assert_works(model)


def test_progress_is_summed_and_keeps_a_load_alive(
    light_model: LightModel, tiny_z_image: Path
) -> None:
    spec = ModelSpec.of(str(tiny_z_image), "float16", "float16")
    loaded = light_model()
    model = RemoteModel(spec, loaded._group, loaded._records)
    shown: list[tuple[int, int]] = []
    model.ensure_loaded(on_progress=lambda done, total: shown.append((done, total)))
    assert shown == sorted(shown)
    assert shown[-1][1] == 200


def test_threads_take_turns(light_model: LightModel) -> None:
    model = light_model()
    with ThreadPoolExecutor(4) as pool:
        inputs = [make_inputs(seed=seed) for seed in range(12)]
        outputs = list(pool.map(model.evaluate, inputs))
    for given, found in zip(inputs, outputs, strict=True):
        assert torch.equal(found, given["x"] * 2 + given["context"].sum())


def test_close_from_another_thread_ends_a_call(light_model: LightModel, home: Path) -> None:
    model = light_model()
    engine = engine_of(model)
    folder = engine.ranks[0].log_path.parent
    with in_background(lambda: model.evaluate(ordered(sleep_s=30))) as evaluating:
        wait_until(lambda: engine.state is State.BUSY, within_s=10.0)
        began = time.monotonic()
        closers = [threading.Thread(target=engine.close) for _ in range(3)]
        for closer in closers:
            closer.start()
        error = evaluating.exception(timeout=10)
        for closer in closers:
            closer.join()
        assert time.monotonic() - began < bound_s(1)
    assert isinstance(error, GroupClosedError)
    assert engine.state is State.CLOSED
    assert_ended([rank.pid for rank in engine.ranks], within_s=0)
    engine.close()
    with pytest.raises(GroupClosedError):
        engine.call(Report)
    assert not folder.exists()
    assert_works(model)


def test_close_waits_for_an_orderly_end(
    light_model: LightModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "CLOSE_TIMEOUT_S", 60.0)  # a machine may be busy
    model = light_model()
    engine = engine_of(model)
    ends: list[str] = []
    for rank in engine.ranks:
        monkeypatch.setattr(rank, "kill", lambda rank=rank: ends.append(rank.describe_exit()))
    engine.close()
    assert ends == ["exited with status 0"] * 2
    assert not engine.ranks[0].log_path.parent.exists()
    assert_works(model)


def test_close_does_not_wait_for_a_stopped_rank(
    light_model: LightModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "CLOSE_TIMEOUT_S", 0.5)
    model = light_model()
    engine = engine_of(model)
    os.kill(engine.ranks[0].pid, signal.SIGSTOP)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < bound_s(2)
    assert_ended([rank.pid for rank in engine.ranks], within_s=0)
