"""In stream order: nothing wrong gets out, and no stream waits for what will not come.

Ranks and engine are real. The stream is a thread here that does what was put into it in order, as
a GPU does; `tests/gpu/test_ahead.py` has a real one.
"""

import contextlib
import gc
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process.conftest import PythonWith, cpu_group, evaluations_may_take, make_inputs

from support.ltx2_inputs import make_ltx2_inputs
from support.tiny_models import write_tiny
from support.workers import bound_s
from tp_runtime.client import (
    CallTimeoutError,
    GroupDiedError,
    InputError,
    ModelSpec,
    RankError,
    RankMemoryError,
    RemoteModel,
    Runtime,
    ahead,
    meanwhile,
)
from tp_runtime.client.engine import LOOKS, Engine, buffers_for
from tp_runtime.client.evaluated import may_be_ahead
from tp_runtime.client.evaluation_times import EvaluationTimes
from tp_runtime.client.held_tensors import HeldTensors
from tp_runtime.client.poll import Poll
from tp_runtime.errors import NotFiniteError, TPRuntimeError
from tp_runtime.wire import stream_wait
from tp_runtime.wire.exchange import Exchange
from tp_runtime.wire.protocol import TensorRef

pytestmark = pytest.mark.process

CPU = torch.device("cpu")
ENDS_S, CALL_TIMEOUT_S = 60.0, 180.0  # on a machine that is busy


class Stream:
    """Work in order, by a thread of its own."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._do, daemon=True).start()

    def _do(self) -> None:
        while True:
            self._work.get()()

    def put(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def is_idle(self, within_s: float) -> bool:
        """Whether all work that was put into it is done by then."""
        done = threading.Event()
        self.put(done.set)
        return done.wait(within_s)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()

    def await_given(exchange: Exchange, _: torch.device, batch_group: int, request: int) -> None:
        exchange._awaited[batch_group] = request
        # Keeps the memory, which is given back with the group.
        numbers = torch.frombuffer(exchange._map, dtype=torch.int32, count=64)

        def wait() -> None:
            while numbers[batch_group] < request:
                time.sleep(0.001)

        stream.put(wait)

    def say_inputs(exchange: Exchange, _: torch.device, request: int) -> None:
        numbers = torch.frombuffer(exchange._map, dtype=torch.int32, count=64)
        stream.put(lambda: numbers[32].fill_(request))

    def write(exchange: Exchange, ref: TensorRef, tensor: torch.Tensor) -> None:
        target = exchange.view(ref)
        stream.put(lambda: target.copy_(tensor))

    def copy_to(_: Exchange, target: torch.Tensor, view: torch.Tensor) -> None:
        target.fill_(torch.nan)
        stream.put(lambda: target.copy_(view))

    def wait(_: Exchange) -> None:
        assert stream.is_idle(within_s=60)

    monkeypatch.setattr(stream_wait, "current", lambda _: stream)
    monkeypatch.setattr(Exchange, "say_inputs", say_inputs)
    monkeypatch.setattr(Exchange, "write", write)
    monkeypatch.setattr(Exchange, "await_given", await_given)
    monkeypatch.setattr(Exchange, "copy_to", copy_to)
    monkeypatch.setattr(Exchange, "wait", wait)
    monkeypatch.setattr(Engine, "_stream_order_of", lambda *_: CPU if may_be_ahead() else None)
    monkeypatch.setattr(EvaluationTimes, "is_short", lambda *_: True)
    return stream


@pytest.fixture(scope="module")
def light(
    python_with: PythonWith, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RemoteModel]:
    """A model on 2 ranks that compute nothing."""
    path = write_tiny("z_image", tmp_path_factory.mktemp("model") / "tiny.safetensors")
    runtime = Runtime()
    spec = ModelSpec.of(str(path), "float32", "float32")
    model = runtime.model(spec, cpu_group(2, python=python_with(), call_timeout_s=CALL_TIMEOUT_S))
    yield model
    runtime.release()


@pytest.fixture
def model(light: RemoteModel, stream: Stream) -> Iterator[RemoteModel]:
    light.ensure_loaded()
    yield light
    # Whatever happened, the next sampling works.
    light.ensure_loaded()
    inputs = make_inputs(seed=5)
    with ahead():
        found = light.evaluate(inputs)
    assert stream.is_idle(within_s=ENDS_S)
    assert torch.equal(found, inputs["x"] * 2 + inputs["context"].sum())


class Gate:
    """What ranks wait for in the middle of an evaluation."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self.order = {"while": str(path)}

    def open(self) -> None:
        self._path.unlink(missing_ok=True)


@pytest.fixture
def gate(model: RemoteModel, tmp_path: Path) -> Iterator[Callable[[], Gate]]:
    """`gate()`: a new one. All are open when the test has ended, and the model works again."""
    gates: list[Gate] = []

    def make() -> Gate:
        gates.append(Gate(tmp_path / f"gate {len(gates)}"))
        return gates[-1]

    yield make
    for one in gates:
        one.open()


def ranks_of(model: RemoteModel) -> list[int]:
    engine = model._group.engine
    assert engine is not None
    return [rank.pid for rank in engine.ranks]


def under_way(model: RemoteModel) -> list[int]:
    """The numbers of its requests."""
    engine = model._group.engine
    assert engine is not None
    return [call.number for call in engine.processes.calls_under_way]


def ordered(**order: Any) -> dict[str, Any]:
    return make_inputs() | {"transformer_options": order}


def test_where_memory_is_short(
    model: RemoteModel, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freeing what is cached waits for the device, and so for all that its streams wait for."""

    def as_full(asked: Any, device: torch.device) -> list[list[torch.Tensor]]:
        assert stream.is_idle(within_s=ENDS_S)
        return buffers_for(asked, device)

    monkeypatch.setattr("tp_runtime.client.engine.buffers_for", as_full)
    with ahead():
        inputs = [make_inputs(seed=seed) for seed in range(2 * LOOKS)]
        found = [model.evaluate(one, known_as="the same") for one in inputs]
    assert stream.is_idle(within_s=ENDS_S)
    for one, given in zip(found, inputs, strict=True):
        assert torch.equal(one, given["x"] * 2 + given["context"].sum())


def test_the_caller_goes_on_while_the_ranks_compute(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate]
) -> None:
    inputs = [make_inputs(seed=seed) for seed in range(3)]
    with ahead():
        found = []
        for one in inputs:
            closed = gate()
            found.append(model.evaluate(one | {"transformer_options": closed.order}))
            assert not stream.is_idle(within_s=0.05)
            assert found[-1].isnan().all()
            closed.open()
    assert stream.is_idle(within_s=ENDS_S)
    for one, result in zip(inputs, found, strict=True):
        assert torch.equal(result, one["x"] * 2 + one["context"].sum())


def test_without_ahead_results_are_there(model: RemoteModel, stream: Stream) -> None:
    inputs = ordered(sleep_s=0.1)
    found = model.evaluate(inputs)
    assert stream.is_idle(within_s=ENDS_S)
    assert torch.equal(found, inputs["x"] * 2 + inputs["context"].sum())
    assert not may_be_ahead()


FAULTS = [
    ({"rank": 1, "raise": "the text"}, RankError, "Rank 1 raised RuntimeError"),
    ({"rank": 0, "raise": "the text"}, RankError, "Rank 0 raised RuntimeError"),
    ({"rank": 0, "exit": 3}, GroupDiedError, "exited with status 3"),
    ({"refuse": "no"}, InputError, "^no$"),
    ({"rank": 1, "allocate": True}, RankMemoryError, "Rank 1 ran out of memory"),
    ({"rank": 1, "sleep_s": 60}, CallTimeoutError, r"Ranks \[1\] gave no sign of life"),
]


@pytest.mark.parametrize(("order", "kind", "text"), FAULTS, ids=lambda value: str(value)[:24])
def test_a_fault_is_raised_when_sampling_ends(
    model: RemoteModel, stream: Stream, order: dict[str, Any], kind: type[Exception], text: str
) -> None:
    def sample() -> None:
        with ahead():
            model.evaluate(ordered(**order))
            assert stream.is_idle(within_s=ENDS_S), (
                "or a thread that reads the result never returns"
            )

    timeout_s = 5.0 if kind is CallTimeoutError else CALL_TIMEOUT_S
    with evaluations_may_take(timeout_s), pytest.raises(kind, match=text):
        sample()
    assert not may_be_ahead()


@pytest.mark.parametrize(("order", "kind", "text"), FAULTS[:5], ids=lambda value: str(value)[:24])
def test_a_fault_is_raised_at_the_next_evaluation(
    model: RemoteModel, order: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with ahead():
        model.evaluate(ordered(**order))
        starts = model._group._num_starts
        with pytest.raises(kind, match=text):
            model.evaluate(make_inputs())
        assert model._group._num_starts == starts, "no group is started only to fail"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate], rank: int
) -> None:
    def sample() -> None:
        with ahead():
            model.evaluate(ordered(**gate().order))
            os.kill(ranks_of(model)[rank], signal.SIGKILL)
            assert stream.is_idle(within_s=ENDS_S)

    with pytest.raises(GroupDiedError, match=f"Rank {rank} "):
        sample()


def test_values_that_are_no_numbers(model: RemoteModel) -> None:
    inputs = make_inputs()
    broken = inputs["x"].clone()
    broken.view(-1)[:3] = torch.nan
    with pytest.raises(InputError, match=r"^3 of the \d+ values of the latent are NaN"), ahead():
        model.evaluate(inputs | {"x": broken})
    with pytest.raises(NotFiniteError, match="values of the model's result are NaN"), ahead():
        model.evaluate(inputs | {"context": inputs["context"] * torch.inf})


def test_a_cancel_waits_for_nothing(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate]
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    def sample() -> None:
        with ahead():
            model.evaluate(ordered(**gate().order))
            model.evaluate(make_inputs(), poll=interrupt)

    with pytest.raises(Interrupted):
        sample()
    assert stream.is_idle(within_s=ENDS_S), "though the ranks compute"


class Cancelled(BaseException):
    """What `Cancel` raises, as newer releases of ComfyUI do: no `Exception`."""


class Cancel(threading.Event):
    """ComfyUI's sign of one, which is there until somebody has raised it."""

    def raise_it(self) -> None:
        if self.is_set():
            self.clear()
            raise Cancelled


@pytest.mark.parametrize("then", ["asks for the next", "ends", "fails", "ends late"])
def test_a_cancel_while_the_sampler_waits_for_a_value(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate], then: str
) -> None:
    """It cannot be asked then whether it still wants to; nothing of what it reads gets out."""
    cancel, closed = Cancel(), gate()

    def sample() -> None:
        with ahead(cancel.raise_it, cancel.is_set):
            model.evaluate(ordered(**closed.order), cancel.raise_it)
            threading.Timer(0.2, cancel.set).start()
            assert stream.is_idle(within_s=ENDS_S), "though the ranks compute"
            if then == "ends late":
                closed.open()
                time.sleep(1)  # the ranks have answered
            if then == "asks for the next":
                model.evaluate(make_inputs(), cancel.raise_it)
            if then == "fails":
                raise ZeroDivisionError

    with pytest.raises(Cancelled):
        sample()
    assert not may_be_ahead()
    assert "tp-cancel" not in [thread.name for thread in threading.enumerate()]


def test_a_cancel_that_was_taken_back(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate]
) -> None:
    cancel, closed = Cancel(), gate()

    def sample() -> None:
        with ahead(cancel.raise_it, cancel.is_set):
            model.evaluate(ordered(**closed.order), cancel.raise_it)
            cancel.set()
            assert stream.is_idle(within_s=ENDS_S), "though the ranks compute"
            cancel.clear()
            closed.open()

    with pytest.raises(TPRuntimeError, match="cancelled while it waited"):
        sample()


def test_an_error_of_the_sampler_lets_the_stream_go_on(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate]
) -> None:
    """Soon: ComfyUI's sign of a cancel is such an error, too."""
    raised = 0.0

    def sample() -> None:
        nonlocal raised
        with ahead():
            model.evaluate(ordered(**gate().order))
            raised = time.monotonic()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample()
    assert time.monotonic() - raised < bound_s(0.4)
    assert stream.is_idle(within_s=ENDS_S), "though the ranks compute"


@pytest.mark.parametrize(("order", "kind", "text"), FAULTS[:5], ids=lambda value: str(value)[:24])
def test_an_error_that_comes_of_a_fault_is_that_fault(
    model: RemoteModel,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
    order: dict[str, Any],
    kind: type[Exception],
    text: str,
) -> None:
    """A sampler that reads values reads any, once the stream was let go."""
    monkeypatch.setattr("tp_runtime.client.evaluated._KNOWN_S", 10.0)  # this machine may be busy

    def sample() -> None:
        with ahead():
            model.evaluate(ordered(**order))
            assert stream.is_idle(within_s=ENDS_S)
            raise ZeroDivisionError

    with pytest.raises(kind, match=text) as caught:
        sample()
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_a_rank_is_stopped(model: RemoteModel, stream: Stream) -> None:
    (pid, _) = ranks_of(model)

    def sample() -> None:
        with ahead():
            model.evaluate(make_inputs())
            os.kill(pid, signal.SIGSTOP)
            model.evaluate(make_inputs(seed=1))
            assert stream.is_idle(within_s=ENDS_S)

    message = r"Ranks \[0\] gave no sign of life"
    with evaluations_may_take(5.0), pytest.raises(CallTimeoutError, match=message):
        sample()


def test_sleep_waits_for_what_is_under_way(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate]
) -> None:
    closed = gate()
    inputs = ordered(**closed.order)
    with ahead():
        found = model.evaluate(inputs)
        sleep = threading.Thread(target=model.sleep)
        sleep.start()
        sleep.join(0.2)
        assert sleep.is_alive()
        closed.open()
        sleep.join(ENDS_S)
        assert not sleep.is_alive()
    assert stream.is_idle(within_s=ENDS_S)
    assert torch.equal(found, inputs["x"] * 2 + inputs["context"].sum())


def test_a_scope_within_another_leaves_the_end_to_that(
    model: RemoteModel, stream: Stream, gate: Callable[[], Gate]
) -> None:
    closed = gate()
    with ahead():
        with ahead():
            model.evaluate(ordered(**closed.order))
        assert not stream.is_idle(within_s=0.05)
        assert len(under_way(model)) == 1
        closed.open()
    assert not under_way(model)
    assert stream.is_idle(within_s=ENDS_S)


def test_what_is_done_meanwhile(model: RemoteModel) -> None:
    """While the next evaluation is under way, or at the end; an error of it is the sampler's."""
    done: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError

    def sample() -> None:
        with ahead():
            for index in range(3):
                model.evaluate(make_inputs())
                assert len(done) == index
                meanwhile(lambda index=index: done.append(index))
            meanwhile(fail)

    meanwhile(lambda: done.append(0))
    assert done.pop() == 0, "without anything under way, at once"
    with pytest.raises(ZeroDivisionError):
        sample()
    assert done == [0, 1, 2]


def test_steps_are_recorded_as_the_ranks_took_them(
    model: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[float] = []
    monkeypatch.setattr(RemoteModel, "_record_step", lambda _, __, ms: recorded.append(ms))
    workload: Any = object()
    with ahead():
        for _ in range(2):
            with model.step(lambda: workload):
                for _ in range(2):
                    model.evaluate(ordered(sleep_s=0.2))
        with model.step(lambda: workload):
            pass
    assert len(recorded) == 2
    assert all(400 <= ms < 4000 for ms in recorded)


# --- inputs in stream order, too ----------------------------------------------------------------

NOTHING = {
    "rank": None,
    "sleep_s": 0.0,
    "while": "",
    "raise": "",
    "exit": 0,
    "refuse": "",
    "allocate": False,
}


class Sampling:
    """Steps whose latents are made, in the stream, of the results before; all are known alike."""

    def __init__(self, model: RemoteModel, stream: Stream) -> None:
        self.model, self.stream = model, stream
        self.inputs = make_inputs()
        self.latent = self.inputs["x"]

    def step(self, poll: Poll | None = None, **order: Any) -> None:
        inputs = self.inputs | {"x": self.latent, "transformer_options": NOTHING | order}
        found = self.model.evaluate(inputs, poll, known_as="the conditioning")
        latent = torch.full_like(found, torch.nan)
        self.stream.put(lambda: latent.copy_(found / 4))
        self.latent = latent

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Within `ahead`, after the first steps, whose conditioning is looked at."""
        with ahead():
            for _ in range(LOOKS):
                self.step()
            yield

    def expected(self, steps: int) -> torch.Tensor:
        latent = self.inputs["x"]
        for _ in range(steps):
            latent = (latent * 2 + self.inputs["context"].sum()) / 4
        return latent

    def result(self) -> torch.Tensor:
        assert self.stream.is_idle(within_s=ENDS_S)
        return self.latent

    def under_way(self) -> list[int]:
        return under_way(self.model)


@pytest.fixture
def sampling(model: RemoteModel, stream: Stream) -> Sampling:
    return Sampling(model, stream)


def test_a_request_is_sent_before_its_latent_is_there(
    sampling: Sampling, gate: Callable[[], Gate]
) -> None:
    gates = [gate() for _ in range(4)]
    with sampling.begun():
        sampling.step(**gates[0].order)
        for number in (1, 2, 3):
            assert sampling.latent.isnan().all()
            if number > 1:
                gates[number - 2].open()  # a third request waits for the first
            sampling.step(**gates[number].order)
            assert len(sampling.under_way()) == 2, "and never more"
        for one in gates:
            one.open()
    assert not sampling.under_way()
    assert torch.equal(sampling.result(), sampling.expected(LOOKS + 4))


def test_every_request_has_its_own_time(sampling: Sampling) -> None:
    """It counts from when the ranks begin it: each takes more than half of what one may take."""
    with sampling.begun(), evaluations_may_take(11.8):
        for _ in range(2):
            sampling.step(sleep_s=6.0)
    assert torch.equal(sampling.result(), sampling.expected(LOOKS + 2))


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize(("order", "kind", "text"), FAULTS[:5], ids=lambda value: str(value)[:24])
def test_a_fault_between_requests(
    sampling: Sampling, place: int, order: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """Whichever of those under way it is, it is raised, and no group is started only to fail."""
    starts = sampling.model._group._num_starts

    def sample() -> None:
        with sampling.begun():
            for step in range(5):
                sampling.step(sleep_s=0.05, **(order if step == place else {}))
            assert sampling.stream.is_idle(within_s=ENDS_S)

    with pytest.raises(kind, match=text):
        sample()
    assert sampling.stream.is_idle(within_s=ENDS_S)
    assert sampling.model._group._num_starts == starts


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_ends_or_stops_between_requests(
    sampling: Sampling, gate: Callable[[], Gate], number: int
) -> None:
    is_killed, closed = number == signal.SIGKILL, gate()
    kind = GroupDiedError if is_killed else CallTimeoutError
    timeout_s = CALL_TIMEOUT_S if is_killed else 5.0

    def sample() -> None:
        with sampling.begun():
            sampling.step()
            sampling.step(**closed.order)
            os.kill(ranks_of(sampling.model)[0], number)
            if not is_killed:
                closed.open()  # for the other rank
            sampling.step()
            assert sampling.stream.is_idle(within_s=ENDS_S)

    message = r"Rank 0 |Ranks \[0\]"
    with evaluations_may_take(timeout_s), pytest.raises(kind, match=message):
        sample()


def test_values_that_are_no_numbers_between_requests(sampling: Sampling) -> None:
    def sample() -> None:
        with sampling.begun():
            sampling.step()
            sampling.latent = sampling.latent * torch.nan
            for _ in range(2):
                sampling.step()

    with pytest.raises(InputError, match="values of the latent are NaN"):
        sample()


def test_a_cancel_waits_for_none_of_the_requests(
    sampling: Sampling, gate: Callable[[], Gate]
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    def sample() -> None:
        with sampling.begun():
            for _ in range(2):
                sampling.step(**gate().order)
            sampling.step(interrupt)

    with pytest.raises(Interrupted):
        sample()
    assert sampling.stream.is_idle(within_s=ENDS_S), "though the ranks compute the first"


def test_conditioning_that_is_new_is_waited_for(sampling: Sampling) -> None:
    """It is looked at, and brought; so it is where it was changed on the CPU."""
    before = sampling.expected(LOOKS + 1)
    with sampling.begun():
        sampling.step(sleep_s=0.2)
        sampling.inputs["context"] = sampling.inputs["context"] + 1
        found = sampling.latent
        sampling.step(sleep_s=0.2)
        assert not found.isnan().any()
    expected = (before * 2 + sampling.inputs["context"].sum()) / 4
    assert torch.equal(sampling.result(), expected)


def test_conditioning_that_is_another_at_every_step(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is said to be, it was not the same twice. On a GPU nobody looks a third time."""
    monkeypatch.setattr(HeldTensors, "may_be", lambda *_: True)
    expected, context = sampling.latent, sampling.inputs["context"]
    with ahead():
        for step in range(5):
            sampling.inputs["context"] = context + step
            expected = (expected * 2 + (context + step).sum()) / 4
            sampling.step()
    assert torch.equal(sampling.result(), expected)


def test_conditioning_that_was_changed_unnoticed(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it is found afterwards: nothing wrong gets out, and from then on it is looked at."""
    engine = sampling.model._group.engine
    assert engine is not None

    def sample() -> None:
        sampling.latent = sampling.inputs["x"]
        with sampling.begun():
            for _ in range(3):
                sampling.step()

    monkeypatch.setattr(HeldTensors, "begin_to_compare", lambda *_: lambda: False)
    with pytest.raises(InputError, match="The conditioning was changed"):
        sample()
    sample()
    assert torch.equal(sampling.result(), sampling.expected(LOOKS + 3))
    monkeypatch.setattr(engine, "_trusts_makers", True)


def test_long_evaluations_are_asked_for_one_by_one(
    sampling: Sampling, gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel leaves the ranks busy with one of them, not with two."""
    monkeypatch.setattr(EvaluationTimes, "is_short", lambda *_: False)
    with sampling.begun():
        for _ in range(3):
            closed = gate()
            sampling.step(**closed.order)
            assert len(sampling.under_way()) == 1
            assert sampling.latent.isnan().all(), "and yet the caller goes on"
            closed.open()
    assert torch.equal(sampling.result(), sampling.expected(LOOKS + 3))


def test_ranks_say_how_long_evaluations_took(sampling: Sampling) -> None:
    before = sampling.model._group.report(ask_ranks=True).ranks
    with sampling.begun():
        for _ in range(3):
            sampling.step(sleep_s=0.2)
    after = sampling.model._group.report(ask_ranks=True).ranks
    for sooner, later in zip(before, after, strict=True):
        assert later["evaluations"] - sooner["evaluations"] == LOOKS + 3
        assert 600 <= later["evaluation_ms"] - sooner["evaluation_ms"] < bound_s(2000)


def test_steps_in_stream_order_are_recorded_one_by_one(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[float] = []
    monkeypatch.setattr(RemoteModel, "_record_step", lambda _, __, ms: recorded.append(ms))
    workload: Any = object()
    began = time.monotonic()
    with sampling.begun():
        for _ in range(3):
            with sampling.model.step(lambda: workload):
                sampling.step(sleep_s=0.8)
    assert len(recorded) == 3
    assert all(ms >= 800 for ms in recorded)
    assert sum(recorded) <= 1000 * (time.monotonic() - began), "none has another's time in it"


def test_latents_of_several_tensors(
    python_with: PythonWith, tmp_path: Path, stream: Stream, gate: Callable[[], Gate]
) -> None:
    """A video's and its sound's, and timesteps that are one tensor for both."""
    path = write_tiny("ltx2", tmp_path / "tiny.safetensors")
    runtime = Runtime()
    group = cpu_group(2, python=python_with(), call_timeout_s=CALL_TIMEOUT_S)
    model = runtime.model(ModelSpec.of(str(path), "float32", "float32"), group)
    model.ensure_loaded()
    inputs = make_ltx2_inputs(model.sizes)
    given = latents = inputs["x"]
    steps = [1.0 - step / 8 for step in range(8)]
    gates = [gate() for _ in steps]
    with ahead():
        for number, time_of_step in enumerate(steps):
            times = torch.full_like(inputs["timesteps"], time_of_step)
            step = inputs | {"x": latents, "timesteps": times, "a_timestep": times}
            step["transformer_options"] = gates[number].order
            # What is looked at waits for the one before, the others for that before it.
            for one in gates[: number if number < LOOKS else max(0, number - 1)]:
                one.open()
            found = model.evaluate(step, known_as="the conditioning")
            latents = [torch.full_like(one, torch.nan) for one in given]
            for latent, one in zip(latents, found, strict=True):
                stream.put(lambda latent=latent, one=one: latent.copy_(one / 4))
            assert latents[0].isnan().all(), "the caller goes on"
        for one in gates:
            one.open()
    assert stream.is_idle(within_s=ENDS_S)
    runtime.release()
    for latent, expected in zip(latents, given, strict=True):
        for time_of_step in steps:
            of_time = torch.full_like(inputs["timesteps"], time_of_step).sum()
            expected = (expected * 2 + inputs["context"].sum() + of_time) / 4
        assert torch.equal(latent, expected)


@pytest.fixture
def divided(python_with: PythonWith, tmp_path: Path) -> Iterator[RemoteModel]:
    """A model on two batch groups."""
    path = write_tiny("z_image", tmp_path / "tiny.safetensors")
    runtime = Runtime()
    group = cpu_group(1, batch_groups=2, python=python_with(), call_timeout_s=CALL_TIMEOUT_S)
    model = runtime.model(ModelSpec.of(str(path), "float32", "float32"), group)
    model.ensure_loaded()
    yield model
    runtime.release()


def test_batch_groups_in_stream_order(divided: RemoteModel, stream: Stream) -> None:
    """Each has evaluations of its own, at every step; four a step are two requests."""
    several = [make_inputs(seed=seed) for seed in range(4)]
    latents = [one["x"] for one in several]
    with ahead():
        for _ in range(6):
            inputs = [one | {"x": x} for one, x in zip(several, latents, strict=True)]
            found = divided.evaluate_all(inputs, known_as=range(4))
            latents = [torch.full_like(one, torch.nan) for one in latents]
            for latent, one in zip(latents, found, strict=True):
                stream.put(lambda latent=latent, one=one: latent.copy_(one / 4))
    assert stream.is_idle(within_s=ENDS_S)
    for one, latent in zip(several, latents, strict=True):
        expected = one["x"]
        for _ in range(6):
            expected = (expected * 2 + one["context"].sum()) / 4
        assert torch.equal(latent, expected)


def test_a_batch_group_without_work_reads_what_it_is_to_hold(
    divided: RemoteModel, stream: Stream
) -> None:
    """Its rank gets no core for a while; the next request's latent must not lie there by then."""
    model = divided

    def of_two(inputs: dict[str, Any]) -> dict[str, Any]:
        context = inputs["context"].repeat(2, 1, 1)
        return inputs | {"x": both, "timesteps": torch.rand(2), "context": context}

    both = torch.randn(2, 16, 16, 16)
    known, alone = make_inputs(seed=1), make_inputs(seed=2)
    idle = ranks_of(model)[1]
    with ahead():
        for _ in range(LOOKS):
            model.evaluate(of_two(known), known_as="known")
        assert stream.is_idle(within_s=ENDS_S)
        os.kill(idle, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (idle, signal.SIGCONT)).start()
        model.evaluate(alone, known_as="alone")
        model.evaluate(of_two(known), known_as="known")
    assert stream.is_idle(within_s=ENDS_S)
    found = model.evaluate(of_two(alone))
    expected = both * 2 + alone["context"].sum()
    torch.testing.assert_close(found, expected)


def test_a_rank_dies_while_the_exchange_waits_for_its_result(
    model: RemoteModel,
    stream: Stream,
    gate: Callable[[], Gate],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where the GPU is full: memory for a comparison is to be had when the stream got on."""
    model._group.close()  # an engine that has not learned to look at what it is given
    model.ensure_loaded()
    closed, compare = gate(), HeldTensors.begin_to_compare
    is_full = threading.Event()

    def when_there_is_room(*args: Any) -> Callable[[], bool]:
        if is_full.is_set():
            threading.Timer(0.2, os.kill, (ranks_of(model)[0], signal.SIGKILL)).start()
            assert stream.is_idle(within_s=ENDS_S)
        return compare(*args)

    monkeypatch.setattr(HeldTensors, "begin_to_compare", when_there_is_room)

    def sample() -> None:
        with ahead():
            for seed in range(LOOKS + 2):
                if seed == LOOKS + 1:
                    is_full.set()
                order = closed.order if seed == LOOKS else {"while": ""}
                step = ordered(**order) | {"x": make_inputs(seed=seed)["x"]}
                model.evaluate(step, known_as="the conditioning")

    with pytest.raises(GroupDiedError, match="Rank 0 "):
        sample()
    assert stream.is_idle(within_s=ENDS_S)


def test_evaluations_outside_of_a_step_are_not_kept(model: RemoteModel) -> None:
    """As those of a guider of a node's own, or of one that leaves steps out."""
    results = [weakref.ref(model.evaluate(make_inputs(seed=seed))) for seed in range(3)]
    gc.collect()
    assert [result() for result in results] == [None, None, None]
    with pytest.raises(RankError), model.step(lambda: pytest.fail("it is not recorded")):
        model.evaluate(ordered(**{"raise": "the text"}))
    assert model._of_step is None


def test_a_process_that_is_forked_leaves_the_ranks_alone(model: RemoteModel) -> None:
    """They have one stream for both: a request of the child's would be answered to the parent."""
    group = model._group
    child = os.fork()
    if not child:
        group._on_user_gone()
        has_asked = any(thread.name.startswith("tp-") for thread in threading.enumerate())
        os._exit(int(has_asked or group.close()))
    _, status = os.waitpid(child, 0)
    assert status == 0
    starts = group._num_starts
    model.evaluate(make_inputs())
    assert group._num_starts == starts
