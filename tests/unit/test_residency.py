"""Which models leave the host's memory for others; a stand-in for the engine keeps account."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tp_runtime.client import SizeError, residency
from tp_runtime.client.residency import Residency
from tp_runtime.machine import Memory
from tp_runtime.wire.protocol import Wake

GIB = 2**30
SIZE = 28 * GIB  # of each model, half of it on either of two GPUs
GPU = 24 * GIB


class Engine:
    """Two ranks on GPUs that take one model each time."""

    config = SimpleNamespace(
        device="cuda",
        num_ranks=2,
        tp_size=2,
        parts_on_host=2,
        where="this machine",
        ray_address="",
    )

    def __init__(self, host_free: int) -> None:
        self.host_free = host_free
        self.gpu_free = GPU
        self.log: list[str] = []
        self.held: set[str] = set()
        self.not_held = 0  # bytes of factors

    def load(self, name: str) -> None:
        self.log.append(f"load {name}")
        if name not in self.held:
            self.gpu_free -= SIZE // 2
        self.held.add(name)

    def sleep(self, name: str, _: Any, on_sent: Callable[[], None]) -> None:
        self.log.append(f"sleep {name}")
        self.gpu_free += SIZE // 2
        self.host_free -= SIZE
        on_sent()

    def unload(self, name: str, _: Any, on_sent: Callable[[], None]) -> None:
        self.log.append(f"unload {name}")
        self.held.discard(name)
        self.host_free += SIZE
        on_sent()

    def patch(self, name: str, weights: Any, _: Any, on_sent: Callable[[], None]) -> None:
        self.log.append(f"patch {name}")
        self.host_free -= SIZE * bool(weights)
        on_sent()

    def bytes_not_held(self, _: Any) -> int:
        return self.not_held

    def call(self, make: Callable[[int], Any], **options: Any) -> list[Any]:
        if make is residency.Report:
            models = dict.fromkeys(self.held)
            return 2 * [{"memory": {"free_bytes": self.gpu_free}, "models": models}]
        request = make(1)
        assert isinstance(request, Wake)
        self.log.append(f"wake {request.model}")
        self.gpu_free -= SIZE // 2
        self.host_free += SIZE
        options["on_sent"]()
        return []


class GivenUpError(BaseException):
    """A cancel."""


class Model:
    """A model whose patches change all of its weights."""

    version: Any = None
    patches: dict[str, Any]
    is_given_up = False  # by who waits for its load
    streams = 0

    def __init__(self, name: str) -> None:
        self.name = self.label = name
        self.patches = {}

    def planned_bytes(self) -> int:
        return SIZE // 2

    def planned_streaming(self) -> int:
        return self.streams

    def bytes_of(self, weights: Any) -> int:
        return SIZE if weights else 0

    def load(self, engine: Engine, *_: Any) -> tuple[list[int], list[int]]:
        engine.load(self.name)
        if self.is_given_up:
            raise GivenUpError
        return 2 * [SIZE // 2], [0, 0]


Machine = Callable[[int], tuple[Engine, Residency]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """`machine(gib)`: with so much of the host's memory free."""
    monkeypatch.setattr(residency, "host_reserve", lambda: 0.0)

    def with_free(gib: int) -> tuple[Engine, Residency]:
        engine = Engine(gib * GIB)
        monkeypatch.setattr(
            residency.machine, "memory", lambda: Memory(64 * GIB, max(0, engine.host_free))
        )
        return engine, Residency(engine, lambda: {"A", "B"}, tuple)  # type: ignore[arg-type]

    return with_free


def test_a_model_is_not_freed_to_make_room_for_itself(machine: Machine) -> None:
    """The host takes one of them: the one that has to leave is freed, the other one wakes."""
    engine, models = machine(30)
    a, b = Model("A"), Model("B")
    for model in (a, b, a, b):
        models.have(model, None)
    assert engine.log == [
        *("load A", "sleep A", "load B"),
        *("unload B", "wake A"),
        *("sleep A", "load B"),
    ]


def test_what_patches_change_has_room_on_the_host(machine: Machine) -> None:
    """The ranks keep it as it was: a model that sleeps is freed for that."""
    engine, models = machine(50)
    a, b = Model("A"), Model("B")
    models.have(a, None)
    models.sleep("A", None)
    b.version, b.patches = 1, {"weight": object()}
    models.have(b, None)
    assert engine.log == ["load A", "sleep A", "load B", "unload A", "patch B"]
    # Other strengths need nothing more; and without patches all of it is given back.
    engine.log.clear()
    b.version = 2
    models.have(b, None)
    b.version, b.patches = None, {}
    models.have(b, None)
    assert engine.log == ["patch B", "patch B"]


def test_patches_that_have_no_room_are_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But on a Ray cluster, whose hosts have memory of their own."""
    engine, models = machine(20)
    a = Model("A")
    a.version, a.patches = 1, {"weight": object()}
    with pytest.raises(
        SizeError, match=r"takes 28\.00 GiB of .* \(28\.00 GiB\).* 20\.00 GiB are left"
    ):
        models.have(a, None)
    assert engine.log == ["load A"]
    monkeypatch.setattr(engine.config, "where", "ray")
    models.have(a, None)
    assert engine.log == ["load A", "patch A"]


def test_each_rank_has_what_a_patch_consists_of(machine: Machine) -> None:
    engine, models = machine(30)
    a = Model("A")
    a.version, a.patches = 1, {"weight": object()}
    engine.not_held = 2 * GIB
    with pytest.raises(
        SizeError, match=r"takes 32\.00 GiB .* \(28\.00 GiB\), and itself in each of 2"
    ):
        models.have(a, None)
    engine.not_held = GIB
    models.have(a, None)
    assert engine.log[-1] == "patch A"


def test_a_load_that_was_given_up_sleeps_where_the_host_has_room(machine: Machine) -> None:
    """As a load that was waited for: else the ranks would take more than there is."""
    for free, left in ((30, "sleep A"), (20, "unload A")):
        engine, models = machine(free)
        a = Model("A")
        a.is_given_up = True
        with pytest.raises(GivenUpError):
            models.have(a, None)
        models.sleep("A", None)
        assert engine.log == ["load A", left]


def test_a_load_that_was_given_up_has_its_room(machine: Machine) -> None:
    """What the ranks hold by now is not asked of the host's memory again."""
    engine, models = machine(30)
    a = Model("A")
    a.is_given_up, a.streams = True, 10 * GIB
    with pytest.raises(GivenUpError):
        models.have(a, None)
    engine.host_free -= 20 * GIB
    a.is_given_up = False
    models.have(a, None)
    assert engine.log == ["load A", "load A"]
    assert models.bytes_on_devices("A") == [SIZE // 2] * 2
    # Where they have refused it meanwhile, it is.
    engine.held.clear()
    b = Model("B")
    b.is_given_up, b.streams = True, 10 * GIB
    engine.host_free = 30 * GIB
    with pytest.raises(GivenUpError):
        models.have(b, None)
    engine.held.clear()
    engine.host_free = 10 * GIB
    with pytest.raises(SizeError, match="must stay in the host's memory"):
        models.have(b, None)


def test_on_ray_the_memory_of_this_machine_decides_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks may be on other hosts."""
    engine, models = machine(4)
    monkeypatch.setattr(engine.config, "where", "ray")
    a = Model("A")
    models.have(a, None)
    models.sleep("A", None)
    assert engine.log == ["load A", "sleep A"]
