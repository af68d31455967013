"""Each fault at each point of a rank's life: one clear error in time, nothing left, and it works.

The ranks compute nothing here; everything else about them is real.
"""

import gc
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from faults.cases import CALL_TIMEOUT_S, DELAY_S, INJECTED, START_TIMEOUT_S, Case
from faults.conftest import Observe, put
from process.conftest import (
    PythonWith,
    assert_ended,
    assert_nothing_left,
    cpu_group,
    make_inputs,
    prepare,
)

from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime import errors
from tp_runtime.client import ModelSpec, RemoteModel, Runtime, TPRuntimeError
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State

pytestmark = pytest.mark.process

ACTIONS = {
    "a rank dies": "die",
    "a rank stops": "stop",
    "a rank raises": "raise",
    "a rank allocates too much": "allocate",
    "a GPU is out of memory": "out of memory",
    "a rank is late": "delay",
}
DOING = {"start": "start", "compile": "Evaluate", "idle": None}
WORDS = {
    "die": r"Rank 1 \(process \d+\) was killed by signal 9",
    "stop": r"Ranks \[(0, )?1\] gave no sign of life for",
    "raise": r"Rank 1 raised RuntimeError{doing}: a fault at '{phase}', as a test asked",
    "allocate": r"Rank 1 ran out of memory on the host{doing} "
    r"\(1152921504606846976 bytes asked for\)\. Use more GPUs",
    "out of memory": r"Rank 1 ran out of memory on the host{doing} \(2\.50 GiB asked for, "
    r"138\.60 GiB held\)\. Use more GPUs \(gpu_count\), a smaller size, fewer frames or .* fp8",
}


class Bench:
    """A model on a group, and what each phase of its life is."""

    def __init__(self, model: RemoteModel, faults: Path) -> None:
        self.model = model
        self._faults = faults
        self._numbers = itertools.count(1)
        self.idle_s = 0.0  # within which an idle group notices that a rank has ended

    @property
    def engine(self) -> Engine:
        engine = self.model._group.engine
        assert engine is not None
        return engine

    def works(self) -> None:
        self.model.ensure_loaded()
        inputs = make_inputs(seed=5)
        assert torch.equal(self.model.evaluate(inputs), inputs["x"] * 2 + inputs["context"].sum())

    def start(self) -> None:
        self.model._group.close()
        self.model.ensure_loaded()

    def load(self) -> None:
        spec = msgspec.structs.replace(self.model.spec, version=(next(self._numbers), 0))
        RemoteModel(spec, self.model._group, self.model._records).ensure_loaded()

    def compile(self) -> None:
        self.model.evaluate(make_inputs(16 + 2 * next(self._numbers)))

    def evaluate(self) -> None:
        self.model.evaluate(make_inputs())

    def sleep(self) -> None:
        self.model.sleep()  # which has nobody to tell of an error
        if self.engine.error:
            raise self.engine.error

    def unload(self) -> None:
        self.engine.unload(self.model.name)

    def idle(self) -> None:
        engine = self.engine
        wait_until(lambda: not self._faults.exists())
        noticed_by = time.monotonic() + self.idle_s
        while engine.error is None and time.monotonic() < noticed_by:
            time.sleep(0.01)
        if engine.error is not None:
            raise engine.error
        self.evaluate()  # a rank that has stopped is not noticed before


@pytest.fixture(scope="module")
def bench(faults: Path, python_with: PythonWith, tiny_z_image: Path) -> Iterator[Bench]:
    runtime = Runtime()
    spec = ModelSpec.of(str(tiny_z_image), "float32", "float32")
    config = cpu_group(
        2, python=python_with(), start_timeout_s=START_TIMEOUT_S, call_timeout_s=CALL_TIMEOUT_S
    )
    prepare(config)
    yield Bench(runtime.model(spec, config), faults)
    runtime.release()


@pytest.fixture(scope="module")
def open_files(bench: Bench) -> Callable[[], int]:
    """How many files this process has open; counted when no group is up."""

    def count() -> int:
        gc.collect()  # groups of other tests
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (one that closes itself)

    return count


def words_of(case: Case) -> str:
    doing = DOING.get(case.phase, case.phase.capitalize())
    during = f" during '{doing}'" if doing else ""
    words = WORDS[ACTIONS[case.fault]]
    return words.replace("{doing}", during).replace("{phase}", case.phase)


@pytest.mark.rotates(5)
@pytest.mark.parametrize("case", INJECTED, ids=lambda case: f"{case.phase}-{case.fault}")
def test_a_fault(
    bench: Bench,
    faults: Path,
    open_files: Callable[[], int],
    observe: Observe,
    case: Case,
    home: Path,
) -> None:
    bench.works()
    before = bench.engine
    held = open_files()
    action = ACTIONS[case.fault]
    bench.idle_s = 0.6 if action in ("stop", "delay") else bound_s(0.6)
    put(faults, rank=1, point=case.phase, action=action, delay_s=DELAY_S)
    error: TPRuntimeError | None = None
    try:
        getattr(bench, case.phase)()
    except TPRuntimeError as raised:
        error = raised
    ended = time.monotonic()
    assert not faults.exists(), "it happened"
    observe(case, ended - float(faults.with_suffix(".at").read_text()))
    if case.result == "works":
        assert error is None
        assert bench.engine is before or case.phase == "start"
        return
    assert type(error) is getattr(errors, case.result), error
    assert re.search(words_of(case), str(error)), error
    engine = bench.engine
    log = engine.ranks[1].log_path
    assert str(log.parent) in str(error) or "The log ends:" in str(error)
    assert log.exists()
    wait_until(lambda: engine.state is State.FAILED)
    assert_ended([rank.pid for rank in engine.ranks], within_s=bound_s(0.5))
    assert_nothing_left(home, within_s=bound_s(0.5))
    del error  # its frames hold views of the shared memory
    assert open_files() < held
    bench.works()
    assert open_files() <= held  # a group of before may have been closing still
