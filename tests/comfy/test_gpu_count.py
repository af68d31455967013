"""What a `gpu_count` means on machines that this one is not: decided before anything starts."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import tp_runtime
from support.native import import_comfy
from support.paths import REPOSITORY
from tp_runtime import DeviceError, GroupConfig, SizeError, inspect_checkpoint

pytestmark = pytest.mark.comfy

Choose = Callable[[int, str], GroupConfig]


@pytest.fixture(scope="module")
def gpu_count() -> Iterator[ModuleType]:
    """The pack's module of that name, as ComfyUI imports it."""
    import_comfy()
    spec = importlib.util.spec_from_file_location(
        "the_pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    assert spec is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "the_pack", importlib.util.module_from_spec(spec))
        patch.setitem(sys.modules, "the_pack.tp_runtime", tp_runtime)
        yield importlib.import_module("the_pack.nodes.gpu_count")


@pytest.fixture
def choose(
    gpu_count: ModuleType, tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Choose, list[str]]:
    """`choose(visible, choice)`: the group on a machine with so many GPUs; and the warnings."""
    info = inspect_checkpoint(str(tiny_z_image))
    warnings: list[str] = []

    def on_machine(visible: int, choice: str) -> GroupConfig:
        monkeypatch.setattr(gpu_count, "visible_gpu_count", lambda: visible)
        monkeypatch.setattr("tp_runtime.config.visible_gpu_count", lambda: visible)
        return gpu_count.choose_group(choice, info, warnings.append)

    return on_machine, warnings


@pytest.mark.parametrize(
    ("visible", "size"), [(1, 1), (2, 2), (5, 5), (6, 6), (7, 6), (8, 8), (16, 8)]
)
def test_auto_is_the_largest_size_that_works(
    choose: tuple[Choose, list[str]], visible: int, size: int
) -> None:
    on_machine, warnings = choose
    group = on_machine(visible, "auto")
    assert (group.tp_size, group.device, group.devices) == (size, "cuda", tuple(range(size)))
    assert not warnings


def test_more_gpus_than_there_are(choose: tuple[Choose, list[str]]) -> None:
    on_machine, _ = choose
    with pytest.raises(
        DeviceError, match=r"4 GPUs .* this machine shows 2 .* at most 2, or 'auto'"
    ):
        on_machine(2, "4")


def test_a_size_that_the_model_cannot_have_is_told_first(
    choose: tuple[Choose, list[str]],
) -> None:
    on_machine, _ = choose
    with pytest.raises(SizeError, match="num_heads=30"):
        on_machine(2, "7")


def test_without_gpus(choose: tuple[Choose, list[str]]) -> None:
    on_machine, warnings = choose
    assert on_machine(0, "auto").tp_size == 1
    assert on_machine(0, "3").device == "cpu"
    assert ["1 CPU process" in warnings[0], "3 CPU processes" in warnings[1]] == [True, True]
