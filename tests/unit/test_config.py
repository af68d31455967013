"""Settings: what is refused, and what the message says."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tp_runtime import config
from tp_runtime.config import GroupConfig, Layout, ModelSpec
from tp_runtime.errors import DeviceError, TPRuntimeError


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(config, "visible_gpu_count", lambda: count)


@pytest.mark.parametrize("name", ["TP_RUNTIME_START_TIMEOUT", "TP_RUNTIME_CALL_TIMEOUT"])
@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf", "1e999"])
def test_a_timeout_must_be_a_number_of_seconds(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(TPRuntimeError, match=f"{name}='{text}': give a number of seconds above 0"):
        GroupConfig(1, "cpu")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_in_code_as_well(value: float) -> None:
    with pytest.raises(TPRuntimeError, match="call_timeout_s="):
        GroupConfig(1, "cpu", call_timeout_s=value)


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_RUNTIME_START_TIMEOUT", "12.5")
    monkeypatch.setenv("TP_RUNTIME_CALL_TIMEOUT", "")
    monkeypatch.setenv("TP_RUNTIME_PYTHON", "/opt/python")
    monkeypatch.setenv("TP_RUNTIME_HOME", "/opt/home")
    group = GroupConfig(1, "cpu")
    assert (group.start_timeout_s, group.call_timeout_s) == (12.5, 600.0)
    assert group.python == "/opt/python"
    assert config.home() == Path("/opt/home")


def test_log_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_RUNTIME_LOG_LEVEL", "debug")
    assert config.log_level() == "DEBUG"
    monkeypatch.setenv("TP_RUNTIME_LOG_LEVEL", "loud")
    with pytest.raises(TPRuntimeError, match="use one of DEBUG, INFO, WARNING, ERROR"):
        config.log_level()


def test_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.attention_kernel() == "auto"
    monkeypatch.setenv("TP_RUNTIME_ATTENTION", "CUDNN")
    assert config.attention_kernel() == "cudnn"
    monkeypatch.setenv("TP_RUNTIME_ATTENTION", "best")
    with pytest.raises(TPRuntimeError, match="'best': use one of auto, fixed, flash3, cudnn"):
        config.attention_kernel()


def test_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel that was chosen by its speed; a kernel that somebody names is no such one."""
    see_gpus(monkeypatch, 0)
    group = GroupConfig.of_layout(Layout(1))
    assert group.attention == "auto"
    steady = dataclasses.replace(group, reproducible=True)
    assert steady != group
    assert steady.attention == "fixed"
    monkeypatch.setenv("TP_RUNTIME_ATTENTION", "sdpa")
    assert steady.attention == "sdpa"


@pytest.mark.parametrize(
    ("variable", "preferred", "expected"),
    [(None, False, False), (None, True, True), ("ON", False, True), ("off", True, False)],
)
def test_the_environment_decides_what_is_reproducible(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, preferred: bool, expected: bool
) -> None:
    if variable is not None:
        monkeypatch.setenv("TP_RUNTIME_REPRODUCIBLE", variable)
    assert config.reproducible(preferred) is expected
    monkeypatch.setenv("TP_RUNTIME_REPRODUCIBLE", "maybe")
    with pytest.raises(TPRuntimeError, match="TP_RUNTIME_REPRODUCIBLE='maybe': use on or off"):
        config.reproducible(preferred)


@pytest.mark.parametrize("tp_size", [-1, 0, 9])
def test_sizes_have_a_range(monkeypatch: pytest.MonkeyPatch, tp_size: int) -> None:
    see_gpus(monkeypatch, 0)
    with pytest.raises(DeviceError, match=f"A TP size of {tp_size}: choose 1 to 8"):
        GroupConfig.of_layout(Layout(tp_size))


def test_without_gpus_the_ranks_are_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 0)
    group = GroupConfig.of_layout(Layout(3))
    assert (group.tp_size, group.device, group.devices) == (3, "cpu", ())
    with pytest.raises(DeviceError, match="no CUDA GPU is visible"):
        GroupConfig.of_layout(Layout(2), (0, 1))


def test_a_group_has_its_tp_size_times_its_batch_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 4)
    group = GroupConfig.of_layout(Layout(2, 2))
    assert (group.num_ranks, group.devices) == (4, (0, 1, 2, 3))
    with pytest.raises(DeviceError, match=r"6 GPUs .* were asked for, but this machine shows 4"):
        GroupConfig.of_layout(Layout(2, 3))
    with pytest.raises(DeviceError, match="4 ranks need as many different GPUs"):
        GroupConfig(2, "cuda", (0, 1), batch_groups=2)
    with pytest.raises(DeviceError, match="A group of 0 ranks"):
        GroupConfig(2, "cpu", batch_groups=0)


def test_the_first_gpus_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    see_gpus(monkeypatch, 4)
    assert GroupConfig.of_layout(Layout(2)).devices == (0, 1)
    assert GroupConfig.of_layout(Layout(2), (3, 1)).devices == (3, 1)


@pytest.mark.parametrize(
    ("tp_size", "devices"), [(3, None), (2, (0, 2)), (1, (-1,)), (8, None)], ids=str
)
def test_gpus_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, devices: tuple[int, ...] | None
) -> None:
    see_gpus(monkeypatch, 2)
    with pytest.raises(DeviceError, match=r"shows 2 \(0 to 1\). Choose at most 2, or 'auto'"):
        GroupConfig.of_layout(Layout(tp_size), devices)


@pytest.mark.parametrize("devices", [(), (0,), (0, 0), (0, 1, 2), (0, 0, 1)], ids=str)
def test_a_rank_has_a_gpu_of_its_own(devices: tuple[int, ...]) -> None:
    with pytest.raises(DeviceError, match="2 ranks need as many different GPUs"):
        GroupConfig(2, "cuda", devices)


def test_cpu_ranks_take_no_gpus() -> None:
    with pytest.raises(DeviceError, match="CPU ranks take no GPUs"):
        GroupConfig(1, "cpu", (0,))


def test_equal_settings_are_one_group() -> None:
    assert len({GroupConfig(2, "cpu"), GroupConfig(2, "cpu"), GroupConfig(1, "cpu")}) == 2


def test_a_replaced_file_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"one")
    before = ModelSpec.of(str(path), "bfloat16", "bfloat16")
    assert ModelSpec.of(str(path), "bfloat16", "bfloat16") == before
    path.write_bytes(b"three")
    assert ModelSpec.of(str(path), "bfloat16", "bfloat16") != before


def test_which_groups_are_in_each_others_way() -> None:
    first, last, both = (GroupConfig(len(gpus), "cuda", gpus) for gpus in ((0,), (1,), (0, 1)))
    assert both.meets(first)
    assert last.meets(both)
    assert not first.meets(last)
    assert GroupConfig(1, "cpu").meets(GroupConfig(2, "cpu"))
    assert not GroupConfig(1, "cpu").meets(first)
    cluster = GroupConfig(1, "cuda", where="ray", ray_address="10.0.0.1:6379")
    assert cluster.meets(GroupConfig(4, "cuda", where="ray", ray_address="10.0.0.1:6379"))
    assert not cluster.meets(GroupConfig(4, "cuda", where="ray", ray_address="10.0.0.2:6379"))
    assert not cluster.meets(first)


def test_what_gpus_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert GroupConfig(1, "cpu").weight_limit() == 0
    monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", "7.5")
    group = GroupConfig(1, "cpu")
    assert group.weight_limit() == group.gpu_memory == 7.5 * 2**30
    assert dataclasses.replace(group, gpu_memory=0) != group
    for text in ("0", "-1", "8 GiB", "nan", "inf"):
        monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", text)
        with pytest.raises(TPRuntimeError, match=f"'{text}': give GiB above 0"):
            config.gpu_memory()


def test_what_gpus_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest decides, and a tenth and a GiB stay free, as ComfyUI leaves them."""
    sizes = [24 * 2**30, 12 * 2**30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(total_memory=sizes[gpu])
    )
    both, large = GroupConfig(2, "cuda", (0, 1)), GroupConfig(1, "cuda", (0,))
    assert both.weight_limit() == 10 * 2**30
    assert large.weight_limit() == large.weight_limit(2**28) == int(23 * 2**30 / 1.1)
    assert large.weight_limit(4 * 2**30) == 18 * 2**30  # less two processes', and what a step needs
    assert both.weight_limit(30 * 2**30) == 0
    assert GroupConfig(1, "cuda", (0,), gpu_memory=5).weight_limit(2**40) == 5
    assert GroupConfig(1, "cuda", where="ray").weight_limit(2**30) == 0
