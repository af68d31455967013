"""What a `gpu_count` means on machines that this one is not: decided before anything starts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from support.pack import pack_module
from tp_runtime import DeviceError, GroupConfig, SizeError, inspect_checkpoint

pytestmark = pytest.mark.comfy

Choose = Callable[..., GroupConfig]


@pytest.fixture(scope="module")
def gpu_count() -> Iterator[ModuleType]:
    """The pack's module of that name."""
    with pack_module("nodes.gpu_count") as module:
        yield module


@pytest.fixture
def choose(
    gpu_count: ModuleType, tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Choose, list[str]]:
    """`choose(visible, choice, devices)`: the group where so many GPUs are; and the warnings."""
    info = inspect_checkpoint(str(tiny_z_image))
    warnings: list[str] = []

    def on_machine(visible: int, choice: str, devices: str = "") -> GroupConfig:
        monkeypatch.setattr(gpu_count, "visible_gpu_count", lambda: visible)
        monkeypatch.setattr("tp_runtime.config.visible_gpu_count", lambda: visible)
        return gpu_count.choose_group(choice, info, warnings.append, devices)

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
    words = r"4 GPUs .* this machine shows 2 .* at most 2, or 'auto'"
    with pytest.raises(DeviceError, match=words):
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


@pytest.mark.parametrize(
    ("choice", "devices", "chosen"),
    [
        ("auto", "0,2,3", (0, 2, 3)),
        ("2", " 3, 1 ,0", (3, 1)),
        ("auto", "5", (5,)),
        ("2", " ", (0, 1)),
    ],
)
def test_listed_devices(
    choose: tuple[Choose, list[str]], choice: str, devices: str, chosen: tuple[int, ...]
) -> None:
    on_machine, _ = choose
    group = on_machine(6, choice, devices)
    assert (group.tp_size, group.devices) == (len(chosen), chosen)


@pytest.mark.parametrize(
    ("visible", "choice", "devices", "words"),
    [
        (4, "auto", "0,x", r"'0,x': give numbers"),
        (4, "auto", "0;1", "give numbers"),
        (4, "auto", "1,", "give numbers"),
        (4, "auto", "-1", "give numbers"),
        (4, "auto", "1,01", "every GPU once"),
        (4, "auto", "0,4", "GPUs 0 to 3"),
        (4, "3", "0,2", r"3 GPUs .* devices lists 2 \(0, 2\)"),
        (0, "auto", "0", "no CUDA GPU is visible"),
    ],
)
def test_devices_that_cannot_be_had(
    choose: tuple[Choose, list[str]], visible: int, choice: str, devices: str, words: str
) -> None:
    on_machine, _ = choose
    with pytest.raises(DeviceError, match=words):
        on_machine(visible, choice, devices)


def test_the_gpus_of_the_settings(
    gpu_count: ModuleType,
    choose: tuple[Choose, list[str]],
    tiny_z_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_machine, _ = choose
    monkeypatch.setattr(gpu_count, "devices_setting", lambda: "3, 1")
    assert on_machine(4, "auto").devices == (3, 1)
    with pytest.raises(DeviceError, match=r"the setting 'GPUs to use' lists 2 \(3, 1\)"):
        on_machine(4, "4")
    refused = gpu_count.refused_counts(str(tiny_z_image))["refused"]
    assert refused.keys() == {"3", "4", "5", "6", "7", "8"}
    monkeypatch.setattr(gpu_count, "devices_setting", lambda: "all")
    with pytest.raises(DeviceError, match=r"the setting 'GPUs to use' is 'all'"):
        on_machine(4, "auto")


def test_the_python_of_the_settings(
    gpu_count: ModuleType, choose: tuple[Choose, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine, _ = choose
    monkeypatch.setattr(gpu_count, "python_setting", lambda: "/opt/tp/bin/python")
    assert on_machine(0, "1").python == "/opt/tp/bin/python"
    monkeypatch.setenv("TP_RUNTIME_PYTHON", "/usr/bin/python3")
    assert on_machine(0, "1").python == "/usr/bin/python3"
