"""A group in use, with real shards: what it says, what it computes, what crosses to it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process.conftest import assert_ended, cpu_group, make_inputs

from support.native import native_model
from support.tiny_models import write_tiny
from support.workers import bound_s
from tp_runtime.client import InputError, ModelSpec, RemoteModel, Runtime, inspect_checkpoint
from tp_runtime.client import engine as engine_module
from tp_runtime.client.engine import Engine
from tp_runtime.client.poll import Poll
from tp_runtime.layouts.link_records import LinkRates
from tp_runtime.wire.protocol import Evaluate, Load, MeasureLink, Request, TensorRef, decode_request

pytestmark = pytest.mark.process

OTHER_SIZE = {"num_heads": 20, "ffn_dim": 1024, "num_layers": 3, "time_dim": 320}


class Interrupted(BaseException):
    """As ComfyUI's InterruptProcessingException is none of Exception's."""


def assert_cancelled(engine: Engine, work: Callable[[Poll], object]) -> None:
    """`work` ends while the ranks are still at it."""
    pid = engine.ranks[1].pid

    def interrupt() -> None:
        raise Interrupted

    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Interrupted):
            work(interrupt)
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def model(runtime: Runtime, tiny_z_image: Path) -> RemoteModel:
    model = runtime.model(ModelSpec.of(str(tiny_z_image), "float32", "float32"), cpu_group())
    model.ensure_loaded()
    return model


@pytest.fixture
def engine(model: RemoteModel) -> Engine:
    engine = model._group.engine
    assert engine is not None
    return engine


@pytest.fixture(scope="module")
def native(tiny_z_image: Path) -> Any:
    return native_model(tiny_z_image)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that the engine sends during the test, as the ranks decode it."""
    requests: list[Request] = []

    def encode(message: Any) -> bytes:
        frame = plain(message)
        requests.append(decode_request(frame))
        return frame

    plain = engine_module.encode
    monkeypatch.setattr(engine_module, "encode", encode)
    return requests


def assert_right(model: RemoteModel, native: Any, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        expected = native(inputs["x"], inputs["timesteps"], inputs["context"], num_tokens=20)
    found = model.evaluate(inputs)
    assert (found - expected).norm() / expected.norm() < 2e-6


def test_ranks_measure_their_link(engine: Engine, model: RemoteModel, native: Any) -> None:
    """All of them at once, and the group is good for evaluations as before."""
    said = engine.call(MeasureLink)
    assert len(said) == 2
    rates = LinkRates.of_ranks(said)
    assert 1e6 < rates.rate < 1e12
    assert 1e6 < rates.exchange_rate < 1e12
    assert 0 <= rates.hop_s < 1
    assert_right(model, native, make_inputs())


def test_every_rank_says_which_size_it_sees(model: RemoteModel, runtime: Runtime) -> None:
    (report,) = runtime.reports()
    assert (report.state, report.tp_size, report.device) == ("ready", 2, "cpu")
    assert [rank["tp_world_size"] for rank in report.ranks] == [2, 2]
    assert [rank["rank"] for rank in report.ranks] == [0, 1]
    assert {"torch", "vllm", "diffusers"} <= set(report.ranks[0]["versions"])


def test_logs_are_the_owners_alone(engine: Engine, home: Path) -> None:
    folder = engine.ranks[0].log_path.parent
    assert folder.parent == home / "groups"
    assert folder.stat().st_mode & 0o777 == 0o700
    for rank in engine.ranks:
        assert f" rank {rank.index} " in rank.log_path.read_text()
    orders = [
        line[:23]
        for line in engine.ranks[0].log_path.read_text().splitlines()
        if " rank 0 " in line
    ]
    assert orders == sorted(orders)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_each_rank_reads_and_holds_its_part(
    runtime: Runtime, model: RemoteModel, tiny_z_image: Path, tp_size: int
) -> None:
    other = runtime.model(model.spec, cpu_group(tp_size))
    other.ensure_loaded()
    info = inspect_checkpoint(str(tiny_z_image))
    total = 4 * info.num_parameters
    report = next(report for report in runtime.reports() if report.tp_size == tp_size)
    for rank in report.ranks:
        held = rank["models"][model.name]
        assert total / tp_size <= held["resident_bytes"] <= 1.05 * total / tp_size
        # Nothing is read that is not held; padding is held and not read.
        assert held["bytes_read"] <= held["resident_bytes"]
    # Together the ranks read the file once, and what is on every rank once for each more.
    assert sum(rank["models"][model.name]["bytes_read"] for rank in report.ranks) >= total * 0.99
    if other._group is not model._group:
        other._group.close()


def test_second_prompt_finds_the_model_loaded(
    model: RemoteModel, engine: Engine, sent: list[Request]
) -> None:
    model.ensure_loaded()
    model.evaluate(make_inputs())
    assert model._group.engine is engine
    assert not [request for request in sent if isinstance(request, Load)]


def references(request: Request) -> dict[str, TensorRef]:
    assert isinstance(request, Evaluate)
    (evaluation,) = request.evaluations
    return {name: ref for name, ref in evaluation.inputs.items() if isinstance(ref, TensorRef)}


def test_conditioning_crosses_once(model: RemoteModel, sent: list[Request]) -> None:
    inputs = make_inputs(seed=11)
    first = model.evaluate(inputs)
    # As samplers do: new objects of the same content.
    again = inputs | {"context": inputs["context"].clone()}
    assert torch.equal(model.evaluate(again), first)
    before, after = map(references, sent)
    assert before["context"].offset >= 0
    assert after["context"].offset == -1
    assert after["context"].key == before["context"].key > 0
    assert after["x"].key == after["timesteps"].key == 0


def test_old_conditioning_is_dropped(
    model: RemoteModel,
    engine: Engine,
    native: Any,
    sent: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = make_inputs(seed=21), make_inputs(seed=22)
    monkeypatch.setattr(engine._sender._held, "_limit_bytes", first["context"].nbytes)
    for inputs in (first, second, first):
        assert_right(model, native, inputs)
    requests = [request for request in sent if isinstance(request, Evaluate)]
    keys = [references(request)["context"].key for request in requests]
    assert requests[1].drop == [keys[0]]
    assert requests[2].drop == [keys[1]]
    assert references(requests[2])["context"].offset >= 0, "sent again"


def test_a_refused_request_leaves_the_group_as_it_was(
    model: RemoteModel, engine: Engine, native: Any
) -> None:
    pids = [rank.pid for rank in engine.ranks]
    wrong = make_inputs(seed=31, caption_width=48)
    for _ in range(2):  # the second time the ranks hold the conditioning
        with pytest.raises(InputError, match=r"width 64\); got \(1, 20, 48\)"):
            model.evaluate(wrong)
    with pytest.raises(InputError, match="does not support the model input strange"):
        model.evaluate(make_inputs(seed=31) | {"strange": 1})
    assert_right(model, native, make_inputs(seed=31))
    assert model._group.engine is engine
    assert [rank.pid for rank in engine.ranks] == pids


def test_a_request_that_cannot_be_sent_leaves_the_group_as_it_was(
    model: RemoteModel, native: Any
) -> None:
    inputs = make_inputs(seed=41)
    with pytest.raises(Exception, match="cannot be encoded"):
        model.evaluate(inputs | {"transformer_options": {"callback": print}})
    assert_right(model, native, inputs)


def test_a_cancelled_step_does_not_disturb_the_next(
    model: RemoteModel, engine: Engine, native: Any
) -> None:
    assert_cancelled(engine, lambda poll: model.evaluate(make_inputs(64, seed=51), poll))
    assert_right(model, native, make_inputs(seed=52))
    assert model._group.engine is engine


def test_a_cancelled_load_does_not_disturb_the_next(
    runtime: Runtime, model: RemoteModel, engine: Engine, native: Any, tmp_path: Path
) -> None:
    path = write_tiny("z_image", tmp_path / "other.safetensors", **OTHER_SIZE)
    other = runtime.model(ModelSpec.of(str(path), "float32", "float32"), model.group_config)
    assert_cancelled(engine, other.ensure_loaded)
    assert_right(model, native, make_inputs(seed=61))
    other.ensure_loaded()
    assert_right(other, native_model(path), make_inputs(seed=62))
    assert_right(model, native, make_inputs(seed=63))
    other.sleep()


def test_two_groups_at_once(
    runtime: Runtime, model: RemoteModel, native: Any, tmp_path: Path
) -> None:
    path = write_tiny("z_image", tmp_path / "other.safetensors", **OTHER_SIZE)
    other = runtime.model(ModelSpec.of(str(path), "float32", "float32"), cpu_group(1))
    other.ensure_loaded()
    other_native = native_model(path)
    for seed in (71, 72):
        assert_right(model, native, make_inputs(seed=seed))
        assert_right(other, other_native, make_inputs(seed=seed))
    other._group.close()
    assert_right(model, native, make_inputs(seed=73))


def test_a_group_that_no_model_uses_ends_with_the_next_load_of_another(
    runtime: Runtime, model: RemoteModel, tmp_path: Path
) -> None:
    """Also of a group that is up already, and so starts nothing."""
    path = write_tiny("z_image", tmp_path / "other.safetensors", **OTHER_SIZE)
    other = runtime.model(ModelSpec.of(str(path), "float32", "float32"), cpu_group(1))
    other.ensure_loaded()
    model.ensure_loaded()
    pids = {group.tp_size: [rank["pid"] for rank in group.ranks] for group in runtime.reports()}
    assert pids.keys() == {1, 2}
    del other
    model.ensure_loaded()
    assert [group.tp_size for group in runtime.reports()] == [2]
    assert_ended(pids[1], within_s=bound_s(5))
    assert [rank["pid"] for rank in runtime.reports()[0].ranks] == pids[2]


def test_release_leaves_nothing(runtime: Runtime, model: RemoteModel, home: Path) -> None:
    model.ensure_loaded()
    assert runtime.release() == 1
    assert runtime.release() == 0
    assert runtime.reports() == []
    assert not list((home / "groups").iterdir())
