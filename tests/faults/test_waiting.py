"""A group fails of one request while others wait: they are carried out on a new group, once.

Its own caller gets the error. Nobody starts groups again and again, and nobody starts one that was
released. The ranks compute nothing here.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGSTOP
from typing import Any

import pytest
import torch
from faults.cases import case
from faults.conftest import Observe, put
from process.conftest import PythonWith, cpu_group, make_inputs

from support.waiting import wait_until
from tp_runtime.client import (
    GroupClosedError,
    GroupDiedError,
    GroupLostError,
    GroupStartError,
    ModelSpec,
    RemoteModel,
    Runtime,
)
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State

pytestmark = pytest.mark.process

OTHERS = 3
ANSWER_S = 30.0


@pytest.fixture(scope="module")
def model(faults: Path, python_with: PythonWith, tiny_z_image: Path) -> Iterator[RemoteModel]:
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    model = runtime.model(spec, cpu_group(2, python=python_with()))
    model.ensure_loaded()  # the process that ranks are forked from is up
    yield model
    runtime.release()


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Engine]:
    """Every group that is started."""
    started: list[Engine] = []
    plain = Engine.start

    def start(engine: Engine, poll: Any = None) -> None:
        started.append(engine)
        plain(engine, poll)

    monkeypatch.setattr(Engine, "start", start)
    return started


def engine_of(model: RemoteModel) -> Engine:
    engine = model._group.engine
    assert engine is not None
    return engine


def right(model: RemoteModel) -> bool:
    """Whether an evaluation, of what may have been loaded long ago, is right."""
    inputs = make_inputs(seed=6)
    return torch.equal(model.evaluate(inputs), inputs["x"] * 2 + inputs["context"].sum())


def kill_unnoticed(model: RemoteModel) -> None:
    """A rank is gone, and the next request comes before anybody knows."""
    engine = engine_of(model)
    with engine.processes._state._lock:  # the engine's thread cannot tell anybody
        engine.ranks[1].kill()
        assert engine.ranks[1].ended(timeout_s=5.0)
        assert engine.state is State.READY


def load_another(model: RemoteModel) -> None:
    other = ModelSpec.of(model.spec.path, "float16", "float32")
    RemoteModel(other, model._group, model._records).ensure_loaded()


# The request that fails; `sleep` has nobody to tell of it.
REQUESTS: dict[str, Callable[[RemoteModel], object]] = {
    "load": load_another,
    "evaluate": lambda model: model.evaluate(make_inputs()),
    "sleep": lambda model: model.sleep(),
    "unload": lambda model: engine_of(model).unload(model.name),
}


@pytest.mark.parametrize("phase", REQUESTS)
def test_a_rank_dies(
    model: RemoteModel, starts: list[Engine], observe: Observe, phase: str
) -> None:
    model.ensure_loaded()
    engine = engine_of(model)
    starts.clear()
    os.kill(engine.ranks[1].pid, SIGSTOP)
    with ThreadPoolExecutor(1 + OTHERS) as pool:
        failing = pool.submit(REQUESTS[phase], model)
        wait_until(lambda: engine.state is State.BUSY)
        waiting = [pool.submit(right, model) for _ in range(OTHERS)]
        time.sleep(0.2)
        assert not any(future.done() for future in (failing, *waiting))
        began = time.monotonic()
        engine.ranks[1].kill()
        error = failing.exception(ANSWER_S)
        assert all(future.result(ANSWER_S) for future in waiting)
        observe(case(phase, "a rank dies while others wait"), time.monotonic() - began)
    if phase != "sleep":
        assert type(error) is GroupDiedError
    assert f"during '{phase.capitalize()}'" in str(error or engine.error)
    assert starts == [engine_of(model)]


def test_a_rank_dies_while_the_weights_of_a_dropped_model_are_freed(
    model: RemoteModel, starts: list[Engine]
) -> None:
    """In the background: nobody asked, and nobody hears of it."""
    model.ensure_loaded()
    other = RemoteModel(
        ModelSpec.of(model.spec.path, "bfloat16", "float32"), model._group, model._records
    )
    other.ensure_loaded()
    engine = engine_of(model)
    starts.clear()
    os.kill(engine.ranks[1].pid, SIGSTOP)
    del other
    wait_until(lambda: engine.state is State.BUSY)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(right, model)
        time.sleep(0.2)
        engine.ranks[1].kill()
        assert waiting.result(ANSWER_S)
    assert "during 'Unload'" in str(engine.error)
    assert starts == [engine_of(model)]


def test_a_report_says_what_it_failed_of(model: RemoteModel, starts: list[Engine]) -> None:
    model.ensure_loaded()
    engine = engine_of(model)
    starts.clear()
    os.kill(engine.ranks[0].pid, SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        reporting = pool.submit(model._group.report)
        wait_until(lambda: engine.state is State.BUSY)
        waiting = pool.submit(right, model)
        time.sleep(0.2)
        engine.ranks[0].kill()
        assert "during 'Report'" in (reporting.result(ANSWER_S).error or "")
        assert waiting.result(ANSWER_S)
    assert starts == [engine_of(model)]


def test_a_rank_dies_in_a_request_that_was_given_up(
    model: RemoteModel, starts: list[Engine]
) -> None:
    """As after a cancel: the ranks finish it for themselves, or do not."""

    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        if engine.state is State.BUSY:
            raise Interrupted

    model.ensure_loaded()
    engine = engine_of(model)
    starts.clear()
    os.kill(engine.ranks[1].pid, SIGSTOP)
    with pytest.raises(Interrupted):
        model.evaluate(make_inputs(), interrupt)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(right, model)
        time.sleep(0.2)
        assert not waiting.done()
        engine.ranks[1].kill()
        assert waiting.result(ANSWER_S)
    assert "during 'Evaluate'" in str(engine.error)
    assert starts == [engine_of(model)]


def test_a_start_fails(
    model: RemoteModel, faults: Path, starts: list[Engine], observe: Observe
) -> None:
    """The one who started it hears of it; who waited for it starts another."""
    model._group.close()
    put(faults, rank=1, point="start", action="die")
    began = time.monotonic()
    with ThreadPoolExecutor(1 + OTHERS) as pool:
        futures = [pool.submit(model.ensure_loaded) for _ in range(1 + OTHERS)]
        errors = [future.exception(ANSWER_S) for future in futures]
    observe(case("start", "a rank dies while others wait"), time.monotonic() - began)
    (error,) = filter(None, errors)
    assert type(error) is GroupStartError
    assert len(starts) == 2
    assert right(model)


def test_not_again_and_again(model: RemoteModel, starts: list[Engine]) -> None:
    """Where ranks die between steps, a sampling goes on on a new group once."""
    model.ensure_loaded()
    starts.clear()
    kill_unnoticed(model)
    assert right(model)
    kill_unnoticed(model)
    with pytest.raises(GroupLostError, match=r"has failed before: .* Queue the prompt again\."):
        right(model)
    assert len(starts) == 1
    model.ensure_loaded()
    kill_unnoticed(model)
    assert right(model)


def test_a_released_group_stays_away(model: RemoteModel, starts: list[Engine]) -> None:
    model.ensure_loaded()
    engine = engine_of(model)
    starts.clear()
    os.kill(engine.ranks[1].pid, SIGSTOP)
    with ThreadPoolExecutor(1 + OTHERS) as pool:
        futures = [pool.submit(right, model) for _ in range(1 + OTHERS)]
        wait_until(lambda: engine.state is State.BUSY)
        time.sleep(0.2)
        model._group.close()
        errors = [future.exception(ANSWER_S) for future in futures]
    assert [type(error) for error in errors] == [GroupClosedError] * (1 + OTHERS)
    with pytest.raises(GroupClosedError, match="was released"):
        right(model)
    assert not starts
    model.ensure_loaded()
    assert right(model)
