"""Where models are: awake, asleep or freed; and what a page can ask of a group."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from process.conftest import assert_ended, cpu_group, make_inputs

from support.tiny_models import write_tiny
from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime.client import GroupReport, InputError, ModelSpec, RemoteModel, Runtime, residency
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State
from tp_runtime.client.rank_processes import RankProcesses
from tp_runtime.rank.host_copy import HostCopy, PartMemory
from tp_runtime.wire.protocol import Evaluate, Load, Request, Sleep, Unload, Wake

pytestmark = pytest.mark.process


@pytest.fixture
def models(runtime: Runtime, tmp_path: Path) -> list[RemoteModel]:
    """Two files on one group; nothing is loaded."""
    found = []
    for seed in (1, 2):
        path = write_tiny("z_image", tmp_path / f"{seed}.safetensors", seed=seed)
        spec = ModelSpec.of(str(path), "float32", "float32")
        found.append(runtime.model(spec, cpu_group()))
    return found


@pytest.fixture
def elsewhere(runtime: Runtime, models: list[RemoteModel]) -> Iterator[RemoteModel]:
    """The first file on another group with the same devices, which ends after the test."""
    model = runtime.model(models[0].spec, cpu_group(1))
    yield model
    runtime.release(model.group_id)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The requests that move weights, as they are sent: kind and model."""
    found: list[tuple[str, str]] = []
    send = Engine._send

    def spy(self: Engine, make: Callable[[int], Request], *args: Any, **kwargs: Any) -> Any:
        def made(number: int) -> Request:
            request = make(number)
            if isinstance(request, Load | Unload | Sleep | Wake):
                found.append((type(request).__name__, request.model))
            return request

        return send(self, made, *args, **kwargs)

    monkeypatch.setattr(Engine, "_send", spy)
    return found


@pytest.fixture
def anonymous() -> Callable[[int], int]:
    """Bytes of memory that are a process's own."""

    def of(pid: int) -> int:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("Anonymous:")]
        return 1024 * int(line.split()[1])

    return of


def the_group(runtime: Runtime) -> GroupReport:
    (report,) = runtime.groups()
    return report


def test_sleep_and_wake(
    runtime: Runtime, models: list[RemoteModel], sent: list[tuple[str, str]]
) -> None:
    """Nothing is read again; ComfyUI is told that the weights take no room meanwhile."""
    model, _ = models
    model.ensure_loaded()
    inputs = make_inputs(seed=3)
    expected = model.evaluate(inputs)
    assert min(model.loaded_bytes()) > 0
    sent.clear()
    model.sleep()
    model.sleep()
    assert model.loaded_bytes() == [0, 0]
    assert the_group(runtime).models[model.name]["asleep"]
    assert torch.equal(model.evaluate(inputs), expected)
    model.sleep()
    model.ensure_loaded()
    model.ensure_loaded()
    assert sent == [(kind, model.name) for kind in ("Sleep", "Wake", "Sleep", "Wake")]


@pytest.mark.parametrize("leave", [RemoteModel.sleep, "unload"])
def test_conditioning_goes_with_a_model_that_leaves(
    runtime: Runtime, models: list[RemoteModel], leave: Any
) -> None:
    """From ComfyUI's GPU and from the ranks'; another model of the group is given its own again."""
    first, second = models
    for model in models:
        model.ensure_loaded()
    inputs = make_inputs(seed=3)
    expected = [model.evaluate(inputs) for model in models]
    engine = first._group.engine
    assert engine is not None
    held = engine._sender._held
    assert held._bytes > 0
    if leave == "unload":
        engine.unload(first.name)
    else:
        leave(first)
    assert (held._bytes, held._held) == (0, {})
    assert torch.equal(second.evaluate(inputs), expected[1])
    if leave != "unload":
        assert torch.equal(first.evaluate(inputs), expected[0])


def test_what_a_page_asks_of_a_group(runtime: Runtime, models: list[RemoteModel]) -> None:
    first, second = models
    for model in models:
        model.ensure_loaded()
    group = the_group(runtime)
    assert (group.state, group.tp_size, group.ranks) == ("ready", 2, [])
    runtime.sleep(group.id)
    assert [model["asleep"] for model in the_group(runtime).models.values()] == [True, True]
    runtime.wake(group.id)
    assert the_group(runtime).models[first.name]["asleep"]
    assert not the_group(runtime).models[second.name]["asleep"], "used last"
    pids = [rank["pid"] for rank in runtime.reports()[0].ranks]
    runtime.restart(group.id)
    assert_ended(pids, within_s=bound_s(5))
    assert the_group(runtime).models == {}
    first.ensure_loaded()
    first.evaluate(make_inputs())
    assert runtime.release(group.id) == 1
    assert runtime.groups() == []
    with pytest.raises(InputError, match="no group 'other'"):
        runtime.sleep("other")


def test_what_is_unloaded_is_freed(
    runtime: Runtime, tmp_path: Path, anonymous: Callable[[int], int]
) -> None:
    """At once: a rank that has nothing to do collects no garbage."""
    large = {"num_heads": 16, "ffn_dim": 4096, "num_layers": 6}
    file = write_tiny("z_image", tmp_path / "large.safetensors", **large)
    model = runtime.model(ModelSpec.of(str(file), "float32", "float32"), cpu_group(1))
    model._group.start()
    (rank,) = runtime.reports()[0].ranks
    before = anonymous(rank["pid"])
    model.ensure_loaded()
    model.evaluate(make_inputs())
    taken = anonymous(rank["pid"]) - before
    assert taken > 0.8 * file.stat().st_size
    engine = model._group.engine
    assert engine is not None
    engine.unload(model.name)
    assert anonymous(rank["pid"]) - before < 0.5 * taken


def test_a_model_makes_room_for_another(
    runtime: Runtime,
    models: list[RemoteModel],
    sent: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU by being freed; what was used longest ago goes first."""
    first, second = models
    first.ensure_loaded()
    sent.clear()
    monkeypatch.setattr(residency, "ROOM_BYTES", 2**60)
    second.ensure_loaded()
    first.ensure_loaded()
    assert sent == [
        ("Unload", first.name),
        ("Load", second.name),
        ("Unload", second.name),
        ("Load", first.name),
    ]


def test_a_group_makes_room_on_another(
    models: list[RemoteModel],
    elsewhere: RemoteModel,
    sent: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which has the same devices, and whose model is still held."""
    first, second = models[0], elsewhere
    first.ensure_loaded()
    monkeypatch.setattr(residency, "ROOM_BYTES", 2**60)
    sent.clear()
    second.ensure_loaded()
    assert sent == [("Unload", first.name), ("Load", second.name)]
    assert first.loaded_bytes() == [0, 0]
    second.evaluate(make_inputs())
    first.ensure_loaded()
    first.evaluate(make_inputs())
    assert sent[2:] == [("Unload", second.name), ("Load", first.name)]


def test_a_group_that_is_changing_is_not_waited_for(
    models: list[RemoteModel], elsewhere: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be waiting for this one."""
    first, second = models[0], elsewhere
    first.ensure_loaded()
    monkeypatch.setattr(residency, "ROOM_BYTES", 2**60)
    with first._group._changing:
        second.ensure_loaded()
    assert min(first.loaded_bytes()) > 0


class Interrupted(BaseException):
    """As ComfyUI's InterruptProcessingException is none of Exception's."""


def interrupt() -> None:
    raise Interrupted


@contextmanager
def stopped_rank(runtime: Runtime) -> Iterator[None]:
    """A rank of the only group stands still."""
    (report,) = runtime.reports()
    rank = psutil.Process(report.ranks[1]["pid"])
    rank.suspend()
    try:
        yield
    finally:
        rank.resume()


def test_a_sleep_and_a_wake_that_were_given_up(
    runtime: Runtime, models: list[RemoteModel], sent: list[tuple[str, str]]
) -> None:
    """They happen all the same, and the engine knows."""
    model, _ = models
    model.ensure_loaded()
    expected = model.evaluate(make_inputs())
    sent.clear()
    with stopped_rank(runtime), pytest.raises(Interrupted):
        model.sleep(interrupt)
    assert the_group(runtime).models[model.name]["asleep"]
    with stopped_rank(runtime), pytest.raises(Interrupted):
        model.ensure_loaded(interrupt)
    assert not the_group(runtime).models[model.name]["asleep"]
    model.sleep()
    assert model.loaded_bytes() == [0, 0]
    assert torch.equal(model.evaluate(make_inputs()), expected)
    assert sent == [(kind, model.name) for kind in ("Sleep", "Wake", "Sleep", "Wake")]


def test_an_unload_that_was_given_up(
    runtime: Runtime,
    models: list[RemoteModel],
    sent: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is loaded anew when it is used next."""
    model, _ = models
    model.ensure_loaded()
    expected = model.evaluate(make_inputs())
    sent.clear()
    monkeypatch.setattr(residency.Residency, "_host_has_room", lambda *_: False)
    with stopped_rank(runtime), pytest.raises(Interrupted):
        model.sleep(interrupt)
    assert the_group(runtime).models == {}
    model.ensure_loaded()
    assert torch.equal(model.evaluate(make_inputs()), expected)
    assert sent == [("Unload", model.name), ("Load", model.name)]


def test_a_sleep_does_not_come_before_a_step_that_waits_for_its_turn(
    runtime: Runtime, models: list[RemoteModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step has made sure already that the model is awake."""
    model, _ = models
    model.ensure_loaded()
    requests: list[str] = []
    send = RankProcesses.send

    def spy(self: RankProcesses, call: Any, *args: Any) -> None:
        requests.append(call.what)
        send(self, call, *args)

    monkeypatch.setattr(RankProcesses, "send", spy)
    with ThreadPoolExecutor(3) as pool:
        with stopped_rank(runtime):
            requests.clear()
            began = threading.Barrier(2)

            def step() -> torch.Tensor:
                began.wait()
                return model.evaluate(make_inputs())

            report = pool.submit(runtime.reports)
            while the_group(runtime).state != State.BUSY.value:
                time.sleep(0.01)
            result = pool.submit(step)
            began.wait()
            while not model._group._changing.locked():
                time.sleep(0.01)
            asleep = pool.submit(model.sleep)
            time.sleep(0.2)
        for future in (report, result, asleep):
            future.result(timeout=30)
    assert requests == ["Report", Evaluate.__name__, Sleep.__name__]


def test_a_load_that_was_given_up_can_be_put_to_sleep(
    runtime: Runtime, models: list[RemoteModel]
) -> None:
    models[0].ensure_loaded()
    with pytest.raises(Interrupted):
        models[1].ensure_loaded(poll=interrupt)
    models[1].sleep(wait=False)

    def is_asleep() -> bool:
        held = runtime.reports()[0].ranks[0]["models"].get(models[1].name, {})
        return bool(held.get("asleep"))

    wait_until(is_asleep, within_s=10.0)
    models[1].ensure_loaded()
    models[1].evaluate(make_inputs())


def test_copies_in_one_piece() -> None:
    tensors = {
        "fp8": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "strided": torch.randn(8, 6)[:, 2:4],
        "empty": torch.empty(0),
        "bf16": torch.randn(7).bfloat16(),
    }
    copy = HostCopy(tensors)
    for name, tensor in tensors.items():
        assert copy.tensors[name].dtype == tensor.dtype
        assert torch.equal(copy.tensors[name].float(), tensor.float())
    copy.close()
    assert not copy.tensors


def test_ranks_with_the_same_part_copy_it_once() -> None:
    """Threads are ranks here; the second one's tensors are others, so that it shows whose count."""
    fd = os.memfd_create("part", os.MFD_CLOEXEC)
    meeting = threading.Barrier(2)
    held = [{"a": torch.arange(2000.0) * sign, "b": torch.empty(0)} for sign in (1, -1)]

    def of_rank(rank: int) -> list[int]:
        part = PartMemory(fd, rank == 0, lambda: meeting.wait(timeout=30))
        taken = []
        for _ in range(2):
            empty = HostCopy({}, part)
            copy = HostCopy(held[rank], part)
            assert torch.equal(copy.tensors["a"], held[0]["a"])
            taken.append(512 * os.fstat(fd).st_blocks)
            for one in (copy, empty, copy):
                one.close()
        meeting.wait(timeout=30)
        return [*taken, os.fstat(fd).st_blocks]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(of_rank, range(2))) == 2 * [[8192, 8192, 0]]
    os.close(fd)
