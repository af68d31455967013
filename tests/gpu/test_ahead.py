"""Results in stream order on a real GPU: right values, faults, and who waits for what."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu.conftest import Load, make_inputs, on_gpu

from support.tiny_models import write_tiny
from tp_runtime.client import (
    GroupConfig,
    GroupDiedError,
    InputError,
    ModelSpec,
    RemoteModel,
    Runtime,
    ahead,
    meanwhile,
)
from tp_runtime.client.engine import LOOKS
from tp_runtime.client.evaluation_times import FIRST_EVALUATIONS
from tp_runtime.client.poll import Poll

pytestmark = pytest.mark.gpu

WAIT_S = 0.5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux", tmp_path_factory.mktemp("model") / "flux.safetensors")


@pytest.fixture
def model(load: Load, file: Path) -> RemoteModel:
    """One whose evaluations are known."""
    model = load(file)
    for _ in range(FIRST_EVALUATIONS + 1):
        model.evaluate(on_gpu(make_inputs("flux")))
    return model


def rank_of(model: RemoteModel) -> int:
    engine = model._group.engine
    assert engine is not None
    return engine.ranks[0].pid


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_computed(event: torch.cuda.Event, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not event.query() and time.monotonic() < deadline:
        time.sleep(0.001)
    return event.query()


def event_after(tensor: torch.Tensor) -> torch.cuda.Event:
    assert tensor.is_cuda
    event = torch.cuda.Event()
    event.record()
    return event


def test_results_are_those_of_one_after_another(model: RemoteModel) -> None:
    inputs = on_gpu(make_inputs("flux"))
    latents = [inputs["x"] * (1 + index / 8) for index in range(16)]
    expected = [model.evaluate(inputs | {"x": latent}) for latent in latents]
    for _ in range(4):
        with ahead():
            found = []
            for latent in latents:
                found.append(model.evaluate(inputs | {"x": latent.clone()}) * 1.0)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_a_latent_that_is_made_of_the_result_before(model: RemoteModel) -> None:
    inputs = on_gpu(make_inputs("flux"))

    def sampled() -> torch.Tensor:
        x = inputs["x"]
        for _ in range(12):
            x = x - model.evaluate(inputs | {"x": x}) / 12
        return x

    expected = sampled()
    with ahead():
        found = sampled()
    assert torch.equal(found, expected)


def test_the_caller_goes_on_while_the_rank_computes(model: RemoteModel) -> None:
    inputs = on_gpu(make_inputs("flux"))
    expected = model.evaluate(inputs)
    with ahead():
        with stopped(rank_of(model)):
            found = model.evaluate(inputs)
            event = event_after(found)
            assert not is_computed(event, WAIT_S)
        assert is_computed(event, 10)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("again", range(10))
def test_a_rank_is_killed(load: Load, file: Path, model: RemoteModel, again: int) -> None:
    inputs = on_gpu(make_inputs("flux"))
    expected = model.evaluate(inputs)
    events = []

    def sample() -> None:
        with ahead():
            with stopped(rank_of(model)):
                events.append(event_after(model.evaluate(inputs)))
                assert not is_computed(events[0], 0.05)
                os.kill(rank_of(model), signal.SIGKILL)
            assert is_computed(events[0], 10), "the stream is let go"

    with pytest.raises(GroupDiedError, match="Rank 0"):
        sample()
    after = load(file).evaluate(inputs)
    assert torch.equal(after, expected)


def test_a_refusal_lets_the_stream_go(model: RemoteModel) -> None:
    inputs = on_gpu(make_inputs("flux"))
    expected = model.evaluate(inputs)
    wrong = inputs | {"attention_mask": torch.ones(5, 5, device="cuda")}
    for _ in range(FIRST_EVALUATIONS + 2):
        with pytest.raises(InputError, match="attention mask"), ahead():
            model.evaluate(wrong)
    with ahead():
        found = model.evaluate(inputs)
    assert torch.equal(found, expected)


def test_a_cancel_waits_for_nothing(model: RemoteModel) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    inputs = on_gpu(make_inputs("flux"))
    expected = model.evaluate(inputs)

    def sample() -> None:
        with ahead():
            model.evaluate(inputs)
            model.evaluate(inputs, poll=interrupt)

    with stopped(rank_of(model)):
        began = time.monotonic()
        with pytest.raises(Interrupted):
            sample()
        torch.cuda.synchronize()
        assert time.monotonic() - began < 0.1
    assert torch.equal(model.evaluate(inputs), expected)


@pytest.mark.parametrize("again", range(10))
def test_a_cancel_while_a_value_is_waited_for(model: RemoteModel, again: int) -> None:
    """Nobody can ask a thread that waits for a GPU whether it still wants to."""

    class Interrupted(BaseException):
        pass

    cancelled = threading.Event()

    def interrupt() -> None:
        if cancelled.is_set():
            raise Interrupted

    inputs = on_gpu(make_inputs("flux"))
    expected = model.evaluate(inputs)
    set_at = 0.0

    def cancel() -> None:
        nonlocal set_at
        set_at = time.monotonic()
        cancelled.set()

    def sample() -> None:
        with ahead(interrupt, cancelled.is_set):
            found = model.evaluate(inputs, interrupt)
            threading.Timer(0.3, cancel).start()
            found.sum().item()
            model.evaluate(inputs, interrupt)

    with stopped(rank_of(model)):
        with pytest.raises(Interrupted):
            sample()
        assert time.monotonic() - set_at < 0.1
    assert torch.equal(model.evaluate(inputs), expected)


def test_long_evaluations_are_asked_for_one_by_one(
    sampling: "Sampling", monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sampling.expected(LOOKS + 8)
    monkeypatch.setattr("tp_runtime.client.evaluation_times.SHORT_S", 0.0)
    with sampling.begun():
        for _ in range(8):
            sampling.step()
            assert sampling.num_under_way() <= 1
    assert torch.equal(sampling.latent, expected)


def test_a_preview_is_made_while_the_rank_computes_the_next(model: RemoteModel) -> None:
    inputs = on_gpu(make_inputs("flux"))
    latents = [inputs["x"] * (1 + index / 8) for index in range(8)]
    expected = [model.evaluate(inputs | {"x": latent}).cpu() for latent in latents]
    seen: list[torch.Tensor] = []
    with ahead():
        for index, latent in enumerate(latents):
            found = model.evaluate(inputs | {"x": latent}) * 1.0
            assert len(seen) == index, "what was left for meanwhile was done"
            meanwhile(lambda preview=found: seen.append(preview.cpu()), found)
            assert len(seen) == index, "or it would wait for what is under way"
    for one, other in zip(seen, expected, strict=True):
        assert torch.equal(one, other)


# --- inputs in stream order, too ----------------------------------------------------------------


class Sampling:
    """Steps whose conditioning is known to be the same."""

    def __init__(self, model: RemoteModel) -> None:
        self.model = model
        self.inputs = on_gpu(make_inputs("flux"))
        self.latent = self.inputs["x"]

    def step(self, poll: Poll | None = None) -> None:
        inputs = self.inputs | {"x": self.latent}
        found = self.model.evaluate(inputs, poll, known_as="the conditioning")
        self.latent = self.latent - found / 12

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Within `ahead`, after the first steps, whose conditioning is looked at; all answered."""
        with ahead():
            for _ in range(LOOKS):
                self.step()
            torch.cuda.synchronize()
            time.sleep(0.05)
            yield

    def num_under_way(self) -> int:
        engine = self.model._group.engine
        assert engine is not None
        return len(engine.processes.calls_under_way)

    def expected(self, steps: int) -> torch.Tensor:
        latent = self.inputs["x"]
        for _ in range(steps):
            latent = latent - self.model.evaluate(self.inputs | {"x": latent}) / 12
        return latent


@pytest.fixture
def sampling(model: RemoteModel) -> Sampling:
    return Sampling(model)


def test_a_request_is_sent_before_its_latent_is_there(sampling: Sampling) -> None:
    expected = sampling.expected(24)
    for _ in range(4):
        sampling.latent = sampling.inputs["x"]
        with ahead():
            for _ in range(24):
                sampling.step()
        assert torch.equal(sampling.latent, expected)


def test_two_requests_are_under_way(sampling: Sampling) -> None:
    expected = sampling.expected(LOOKS + 2)
    with sampling.begun():
        with stopped(rank_of(sampling.model)):
            for _ in range(2):
                sampling.step()
            assert sampling.num_under_way() == 2
            assert not is_computed(event_after(sampling.latent), WAIT_S)
        assert is_computed(event_after(sampling.latent), 10)
    assert torch.equal(sampling.latent, expected)


@pytest.mark.parametrize("again", range(10))
def test_a_rank_is_killed_with_two_requests(
    load: Load, file: Path, sampling: Sampling, again: int
) -> None:
    expected = sampling.expected(3)

    def sample() -> None:
        with sampling.begun():
            with stopped(rank_of(sampling.model)):
                for _ in range(1 + again % 2):
                    sampling.step()
                event = event_after(sampling.latent)
                os.kill(rank_of(sampling.model), signal.SIGKILL)
            assert is_computed(event, 10), "the stream is let go"
            sampling.step()

    with pytest.raises(GroupDiedError, match="Rank 0"):
        sample()
    after = Sampling(load(file))
    assert torch.equal(after.expected(3), expected)


def test_a_cancel_waits_for_none_of_the_requests(sampling: Sampling) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt() -> None:
        raise Interrupted

    expected = sampling.expected(2)

    began = 0.0

    with contextlib.ExitStack() as meanwhile_stopped:

        def sample() -> None:
            nonlocal began
            with sampling.begun():
                meanwhile_stopped.enter_context(stopped(rank_of(sampling.model)))
                began = time.monotonic()
                for _ in range(2):
                    sampling.step()
                sampling.step(interrupt)

        with pytest.raises(Interrupted):
            sample()
        torch.cuda.synchronize()
        assert time.monotonic() - began < 0.1
    assert torch.equal(sampling.expected(2), expected)


def test_conditioning_that_was_changed_unnoticed(sampling: Sampling) -> None:
    """Nothing wrong gets out; and from then on it is looked at."""
    context = sampling.inputs["context"]
    before, after = context.clone(), context + 1

    def sample() -> None:
        sampling.latent = sampling.inputs["x"]
        context.copy_(before)
        with sampling.begun():
            context.copy_(after)
            sampling.step()
            sampling.step()

    with pytest.raises(InputError, match="The conditioning was changed"):
        sample()
    sample()
    expected = sampling.inputs["x"]
    for now in (*LOOKS * [before], after, after):
        inputs = sampling.inputs | {"x": expected, "context": now}
        expected = expected - sampling.model.evaluate(inputs) / 12
    assert torch.equal(sampling.latent, expected)


def test_a_refusal_between_requests(sampling: Sampling) -> None:
    expected = sampling.expected(3)
    wrong = sampling.inputs | {"attention_mask": torch.ones(5, 5, device="cuda")}

    def sample() -> None:
        with sampling.begun():
            for _ in range(LOOKS + 2):
                sampling.model.evaluate(wrong, known_as="the conditioning")

    for _ in range(FIRST_EVALUATIONS + 2):
        with pytest.raises(InputError, match="attention mask"):
            sample()
    sampling.latent = sampling.inputs["x"]
    with ahead():
        for _ in range(3):
            sampling.step()
    assert torch.equal(sampling.latent, expected)


def test_batch_groups(runtime: Runtime, file: Path) -> None:
    """Of two GPUs each has an item of its own, whatever the other one is at."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    spec = ModelSpec.of(str(file), "float32", "float32", "auto")
    model = runtime.model(spec, GroupConfig(1, "cuda", (0, 1), batch_groups=2))
    model.ensure_loaded()
    sampling = Sampling(model)
    expected = sampling.expected(24)
    for _ in range(8):
        sampling.latent = sampling.inputs["x"]
        with ahead():
            for _ in range(24):
                sampling.step()
        assert torch.equal(sampling.latent, expected)
