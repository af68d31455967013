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

    def load(self, name: str) -> None:
        self.log.append(f"load {name}")
        self.gpu_free -= SIZE // 2

    def sleep(self, name: str, _: Any, on_sent: Callable[[], None]) -> None:
        self.log.append(f"sleep {name}")
        self.gpu_free += SIZE // 2
        self.host_free -= SIZE
        on_sent()

    def unload(self, name: str, _: Any, on_sent: Callable[[], None]) -> None:
        self.log.append(f"unload {name}")
        self.host_free += SIZE
        on_sent()

    def patch(self, name: str, weights: Any, _: Any, on_sent: Callable[[], None]) -> None:
        self.log.append(f"patch {name}")
        self.host_free -= SIZE * bool(weights)
        on_sent()

    def call(self, make: Callable[[int], Any], **options: Any) -> list[Any]:
        if make is residency.Report:
            return 2 * [{"memory": {"free_bytes": self.gpu_free}}]
        request = make(1)
        assert isinstance(request, Wake)
        self.log.append(f"wake {request.model}")
        self.gpu_free -= SIZE // 2
        self.host_free += SIZE
        options["on_sent"]()
        return []


class Model:
    """A model whose patches change all of its weights."""

    version: Any = None
    patches: dict[str, Any]

    def __init__(self, name: str) -> None:
        self.name = self.label = name
        self.patches = {}

    def planned_bytes(self) -> int:
        return SIZE // 2

    def planned_streaming(self) -> int:
        return 0

    def bytes_of(self, weights: Any) -> int:
        return SIZE if weights else 0

    def load(self, engine: Engine, *_: Any) -> tuple[list[int], list[int]]:
        engine.load(self.name)
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
    with pytest.raises(SizeError, match=r"changes weights of 28\.00 GiB.* has 20\.00 GiB left"):
        models.have(a, None)
    assert engine.log == ["load A"]
    monkeypatch.setattr(engine.config, "where", "ray")
    models.have(a, None)
    assert engine.log == ["load A", "patch A"]
