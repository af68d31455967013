"""What a `gpu_count` means on machines that this one is not: decided before anything starts."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from support.pack import pack_module
from tp_runtime import config, machine
from tp_runtime.client import (
    CheckpointInfo,
    DeviceError,
    GroupConfig,
    SizeError,
    inspect_checkpoint,
)
from tp_runtime.config import Layout
from tp_runtime.layouts import choice
from tp_runtime.layouts.cost_model import DEVICES, LINKS, Device, Link, device_of
from tp_runtime.layouts.gpus import Gpu, by_architecture
from tp_runtime.layouts.link_records import LinkRates, LinkRecords, Speed
from tp_runtime.layouts.step_history import MIN_TIMES, StepRecords, Workload, times_of

pytestmark = pytest.mark.comfy

Choose = Callable[..., GroupConfig]
GPU, H200 = "NVIDIA H200", DEVICES["H200"]
GIB = 2**30
LINK_BETWEEN = choice.link_between
CFG = Workload((2, 16, 128, 128), 77)
SINGLE = Workload((1, 16, 128, 128), 77)


@pytest.fixture(scope="module")
def gpu_count() -> Iterator[ModuleType]:
    """The pack's module of that name."""
    with pack_module("nodes.gpu_count") as module:
        yield module


@pytest.fixture
def records(tmp_path: Path) -> StepRecords:
    """What the machine remembers of the steps of samplers: nothing yet."""
    return StepRecords(tmp_path / "step_records.json")


@pytest.fixture
def links(tmp_path: Path) -> LinkRecords:
    """And how its GPUs are connected: nothing has been measured."""
    return LinkRecords(tmp_path / "link_records.json")


@pytest.fixture
def choose(
    gpu_count: ModuleType,
    tiny_z_image: Path,
    records: StepRecords,
    links: LinkRecords,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Choose, list[str]]:
    """`choose(visible, choice, devices, layout, where, precision)`: the group on so many GPUs;
    warnings.
    """
    info = inspect_checkpoint(str(tiny_z_image))
    # Of the published size: what is small is predicted to be the fastest on one GPU.
    info = replace(info, sizes=info.family.published)
    monkeypatch.setattr(
        gpu_count, "get_runtime", lambda: SimpleNamespace(records=records, links=links)
    )
    monkeypatch.setattr(config, "device_name", lambda gpu: "cpu" if gpu is None else GPU)
    monkeypatch.setattr(
        choice, "gpus_of", lambda gpus: [Gpu(gpu, GPU, 141 * GIB, H200) for gpu in gpus]
    )
    monkeypatch.setattr(choice, "link_between", lambda *_: LINKS["nvlink"])
    warnings: list[str] = []

    def on_machine(
        visible: int,
        choice: str,
        devices: str = "",
        layout: str = "auto",
        where: str = "this machine",
        precision: str = "exact",
    ) -> GroupConfig:
        monkeypatch.setattr(gpu_count, "visible_gpu_count", lambda: visible)
        monkeypatch.setattr("tp_runtime.config.visible_gpu_count", lambda: visible)
        placement = gpu_count.Placement(choice, devices, layout, where, precision)
        return gpu_count.choose_group(placement, info, warnings.append)

    return on_machine, warnings


@pytest.mark.parametrize(
    ("visible", "size"), [(1, 1), (2, 2), (5, 5), (6, 6), (7, 6), (8, 8), (16, 8)]
)
def test_auto_is_the_largest_size_that_works(
    choose: tuple[Choose, list[str]], visible: int, size: int
) -> None:
    """Where the GPUs may share the work by tensor parallelism alone."""
    on_machine, warnings = choose
    group = on_machine(visible, "auto", layout="tp")
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
        on_machine(2, "7", layout="tp")


def test_any_count_works_where_tokens_are_shared(choose: tuple[Choose, list[str]]) -> None:
    """Of 30 heads 7 ranks have 4 or 5; tensor parallelism would pad them to 35."""
    on_machine, _ = choose
    for count in range(1, 9):
        assert on_machine(8, str(count)).num_ranks == count
    assert str(on_machine(7, "7").layout) == "1x7x1"
    assert str(on_machine(0, "7").layout) == "1x7x1"
    with pytest.raises(DeviceError, match="7 GPUs were asked for"):
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
    group = on_machine(6, choice, devices, layout="tp")
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
    assert on_machine(4, "2").devices == (3, 1)
    with pytest.raises(DeviceError, match=r"the setting 'GPUs to use' lists 2 \(3, 1\)"):
        on_machine(4, "4")
    refused = gpu_count.refused_counts(str(tiny_z_image), gpu_count.Placement())["refused"]
    assert refused.keys() == {"3", "4", "5", "6", "7", "8"}
    monkeypatch.setattr(gpu_count, "devices_setting", lambda: "all")
    with pytest.raises(DeviceError, match=r"The setting 'GPUs to use' is 'all'"):
        on_machine(4, "auto")


def test_the_python_of_the_settings(
    gpu_count: ModuleType, choose: tuple[Choose, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine, _ = choose
    monkeypatch.setattr(gpu_count, "python_setting", lambda: "/opt/tp/bin/python")
    assert on_machine(0, "1").python == "/opt/tp/bin/python"
    monkeypatch.setenv("TP_RUNTIME_PYTHON", "/usr/bin/python3")
    assert on_machine(0, "1").python == "/usr/bin/python3"


def measured(records: StepRecords, path: Path, workload: Workload, **times: float) -> None:
    """So long did steps take, by layout (`tp4x1=72.0`)."""
    for layout, ms in times.items():
        for _ in range(MIN_TIMES):
            records.add(str(path), GPU, workload, Layout.parse(layout.removeprefix("tp")), ms)


def test_auto_divides_a_batch_where_that_was_measured_to_be_faster(
    choose: tuple[Choose, list[str]], records: StepRecords, tiny_z_image: Path
) -> None:
    on_machine, warnings = choose
    of_batch_groups = {"tp4x1": 72.0, "tp2x2": 60.0, "tp1x4": 30.0}
    sharing_tokens = {"tp1x2x2": 61.0, "tp2x2x1": 70.0, "tp1x4x1": 70.0}
    measured(records, tiny_z_image, CFG, **of_batch_groups, **sharing_tokens)
    group = on_machine(4, "4")
    assert (group.tp_size, group.batch_groups, group.devices) == (2, 2, (0, 1, 2, 3))
    (warning,) = warnings
    assert "layout 2x2" in warning
    assert "60 ms measured a step, and 4x1 takes 72 ms measured" in warning
    assert on_machine(4, "4", layout="tp").batch_groups == 1
    assert on_machine(4, "2").num_ranks == 2


def test_what_was_measured_in_8_bits_counts_for_8_bits(
    choose: tuple[Choose, list[str]],
    records: StepRecords,
    tiny_z_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_machine, warnings = choose
    measured(records, tiny_z_image, CFG, tp2x1=60.0, tp1x2=70.0, tp1x2x1=70.0)
    assert str(on_machine(2, "2").layout) == "2x1"
    monkeypatch.setattr(choice, "link_between", lambda *_: LINKS["pcie5-host"])
    as_kept = times_of(GPU, "fast")
    for layout, ms in (("2x1", 90.0), ("1x2", 30.0), ("1x2x1", 90.0)):
        for _ in range(MIN_TIMES):
            records.add(str(tiny_z_image), as_kept, CFG, Layout.parse(layout), ms)
    group = on_machine(2, "2", precision="fast")
    assert str(group.layout) == "1x2"
    assert "30 ms measured" in warnings[-1]


def test_what_was_measured_decides_nothing_where_bits_are_to_be_the_same(
    choose: tuple[Choose, list[str]],
    records: StepRecords,
    tiny_z_image: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_machine, warnings = choose
    before = on_machine(4, "auto").layout
    measured(records, tiny_z_image, CFG, tp4x1=72.0, tp2x2=60.0, tp1x4=30.0)
    assert on_machine(4, "auto").layout != before
    monkeypatch.setenv("TP_RUNTIME_REPRODUCIBLE", "on")
    group = on_machine(4, "auto")
    assert (group.layout, group.reproducible) == (before, True)
    assert "measured a step" not in warnings[-1]


def test_what_was_not_measured_is_predicted(
    choose: tuple[Choose, list[str]], records: StepRecords, tiny_z_image: Path
) -> None:
    """Two groups of one GPU halve a batch of two, and have nothing to tell one another."""
    on_machine, warnings = choose
    measured(records, tiny_z_image, CFG, tp2x1=100.0)
    group = on_machine(2, "2")
    assert (group.tp_size, group.batch_groups) == (1, 2)
    assert "predicted a step, and 2x1 takes 100 ms measured" in warnings[0]


def test_one_latent_is_not_divided(
    choose: tuple[Choose, list[str]], records: StepRecords, tiny_z_image: Path
) -> None:
    on_machine, _ = choose
    measured(records, tiny_z_image, SINGLE, tp4x1=72.0, tp2x2=10.0)
    assert on_machine(4, "4").batch_groups == 1


def test_auto_takes_fewer_gpus_where_more_are_slower(
    choose: tuple[Choose, list[str]], records: StepRecords, tiny_z_image: Path
) -> None:
    on_machine, warnings = choose
    measured(records, tiny_z_image, SINGLE, tp2x1=50.0, tp1x1=40.0, tp1x2x1=45.0)
    group = on_machine(2, "auto")
    assert (group.num_ranks, group.devices) == (1, (0,))
    assert "layout 1x1" in warnings[0]
    assert on_machine(2, "2").num_ranks == 2


@pytest.fixture
def linked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Link], None]:
    """Have the GPUs connected by this."""
    return lambda link: monkeypatch.setattr(choice, "link_between", lambda *_: link)


@pytest.mark.parametrize(
    ("visible", "count", "layout"),
    [(4, "auto", "1x4x1"), (4, "4", "1x4x1"), (2, "auto", "1x2x1"), (4, "3", "1x3x1")],
)
def test_without_nvlink_the_first_prompt_runs_on_what_is_predicted(
    choose: tuple[Choose, list[str]],
    linked: Callable[[Link], None],
    visible: int,
    count: str,
    layout: str,
) -> None:
    on_machine, warnings = choose
    linked(LINKS["pcie5-host"])
    group = on_machine(visible, count)
    assert str(group.layout) == layout
    (warning,) = warnings
    assert f"the layout {layout} (TP size x sequence size x batch groups): " in warning
    assert "(1, 16, 128, 128) as usual for the model" in warning
    assert "pcie5-host" in warning


def test_with_nvlink_the_first_prompt_needs_a_gain(choose: tuple[Choose, list[str]]) -> None:
    on_machine, warnings = choose
    assert str(on_machine(2, "auto").layout) == "2x1"
    assert not warnings


def test_no_more_gpus_than_help(
    choose: tuple[Choose, list[str]], linked: Callable[[Link], None]
) -> None:
    on_machine, warnings = choose
    linked(replace(LINKS["pcie-host"], rate=1e9, exchange_rate=1e9))
    assert str(on_machine(4, "auto").layout) == "1x1"
    assert "the layout 1x1 (TP size x batch groups): " in warnings[0]
    assert on_machine(4, "4").num_ranks == 4
    linked(LINKS["pcie-host"])
    assert str(on_machine(4, "auto", layout="tp").layout) == "1x1"


def test_a_layout_whose_weights_do_not_fit_is_not_taken(
    choose: tuple[Choose, list[str]],
    linked: Callable[[Link], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not where reading them from the host's memory makes it slower than another one."""
    on_machine, warnings = choose
    linked(LINKS["pcie5-host"])
    monkeypatch.setattr(CheckpointInfo, "weight_bytes", lambda *_, **__: 200 * GIB)
    assert str(on_machine(4, "auto").layout) == "2x2x1"
    assert "1x4x1 would be faster if its weights fitted: of 200.0 GiB, a GPU holds" in warnings[-1]
    monkeypatch.setattr(CheckpointInfo, "weight_bytes", lambda *_, **__: 600 * GIB)
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(900 * GIB, 900 * GIB))
    assert str(on_machine(4, "auto").layout) == "4x1"
    assert "Each GPU reads 2" in warnings[-1]


# --- GPUs that are not alike --------------------------------------------------------------------

# What torch tells of cards that are not in the table.
GTX_1660 = SimpleNamespace(major=7, minor=5, multi_processor_count=22)
A6000 = SimpleNamespace(
    major=8,
    minor=6,
    multi_processor_count=84,
    clock_rate=1_800_000,
    memory_clock_rate=8_001_000,
    memory_bus_width=384,
)


def gpu(name: str, memory: int, kind: Device | None = None) -> Gpu:
    return Gpu(0, f"NVIDIA {name}", memory * GIB, kind or DEVICES[name.removeprefix("GeForce ")])


KINDS = {
    one.name.rpartition(" ")[2]: one
    for one in (
        gpu("GeForce RTX 3060", 12),
        gpu("GeForce RTX 3080", 10),
        gpu("GeForce RTX 3090", 24),
        gpu("GeForce RTX 4090", 24),
        gpu("GeForce GTX 1660", 6, by_architecture("NVIDIA GeForce GTX 1660", GTX_1660)),
        gpu("RTX A6000", 48, by_architecture("NVIDIA RTX A6000", A6000)),
    )
}


@pytest.fixture
def unlike(
    choose: tuple[Choose, list[str]],
    linked: Callable[[Link], None],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., GroupConfig]:
    """`unlike(kinds, choice, devices, layout)`: the group on a machine with these GPUs."""
    linked(LINKS["pcie-host"])

    def on_machine(kinds: str, *arguments: str, **options: str) -> GroupConfig:
        gpus = [replace(KINDS[kind], number=number) for number, kind in enumerate(kinds.split())]
        monkeypatch.setattr(choice, "gpus_of", lambda numbers: [gpus[one] for one in numbers])
        monkeypatch.setattr(
            config, "device_name", lambda gpu: "cpu" if gpu is None else gpus[gpu].name
        )
        return choose[0](len(gpus), *arguments, **options)

    return on_machine


@pytest.mark.parametrize(
    ("kinds", "count", "layout", "devices"),
    [
        ("3060 4090 4090", "auto", "1x2x1", (1, 2)),  # with the slow one, slower than on two
        ("3080 3090", "auto", "1x2x1", (1, 0)),  # slower, and yet of use
        ("3090 4090", "auto", "1x1", (1,)),
        ("3060 4090", "auto", "1x1", (1,)),
        ("3060 3090 4090", "2", "1x2x1", (2, 1)),
        ("3060 3090 4090", "3", "1x3x1", (2, 1, 0)),
        ("1660 4090", "2", "1x2x1", (1, 0)),
        ("A6000 A6000", "auto", "1x2x1", (0, 1)),  # not in the table
    ],
)
def test_gpus_that_do_not_help_are_left_out_and_others_are_not(
    choose: tuple[Choose, list[str]],
    unlike: Callable[..., GroupConfig],
    kinds: str,
    count: str,
    layout: str,
    devices: tuple[int, ...],
) -> None:
    group = unlike(kinds, count)
    assert (str(group.layout), group.devices) == (layout, devices)
    (warning,) = choose[1]
    if len(set(kinds.split())) == 1:
        return
    used, left = f"devices={devices[0]} leaves the others out", "Not used: GPU"
    names = [KINDS[kinds.split()[number]].name for number in devices]
    assert (used in warning) == (len(set(names)) > 1)
    assert (left in warning) == (len(set(names)) == 1)


def test_an_unknown_gpu_that_was_measured_is_left_out(
    unlike: Callable[..., GroupConfig], links: LinkRecords
) -> None:
    assert unlike("3090 1660", "2", layout="tp").devices == (0, 1)
    slow = Speed(5e12, 4e12, 0.1e12, 22)
    fast = Speed(100e12, 80e12, 0.6e12, 90)
    links.add(["1 NVIDIA GeForce GTX 1660"], LinkRates(12e9, 17e9, 5e-6), [slow])
    assert str(unlike("3090 1660", "auto").layout) == "1x1"
    links.add(["1 NVIDIA GeForce GTX 1660"], LinkRates(12e9, 17e9, 5e-6), [fast])
    assert unlike("3090 1660", "2", layout="tp").devices == (1, 0)


def test_which_gpu_is_left_out_and_why(
    choose: tuple[Choose, list[str]], unlike: Callable[..., GroupConfig]
) -> None:
    unlike("3060 4090 4090", "auto")
    assert "Not used: GPU 0 (NVIDIA GeForce RTX 3060, 12 GiB)." in choose[1][-1]
    assert "so the slowest sets the pace, and the smallest what fits" in choose[1][-1]
    unlike("3060 4090 4090", "3", layout="tp")
    assert "RTX 3060, 12 GiB)): every GPU has an equal share" in choose[1][-1]
    assert choose[1][-1].endswith("devices=1,2 leaves the others out.")
    unlike("3060 4090 4090", "auto", "1,2")
    assert "3060" not in choose[1][-1]
    choose[1].clear()
    assert unlike("4090 4090", "2", layout="tp").devices == (0, 1)
    assert not choose[1]


def test_a_gpu_that_is_too_small_for_its_share_is_left_out(
    choose: tuple[Choose, list[str]],
    unlike: Callable[..., GroupConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """40 GiB of weights: a third of them, and the room beside, is too much for 12 GiB."""
    monkeypatch.setattr(CheckpointInfo, "weight_bytes", lambda *_, **__: 40 * GIB)
    for layout in ("tp", "auto"):
        group = unlike("3060 3090 3090", "auto", layout=layout)
        assert (str(group.layout), group.devices) == ("2x1", (1, 2))
        assert "Not used: GPU 0 (NVIDIA GeForce RTX 3060, 12 GiB)." in choose[1][-1]
    # Where nothing fits, the shares are as small as can be, and the rest is streamed.
    monkeypatch.setattr(CheckpointInfo, "weight_bytes", lambda *_, **__: 90 * GIB)
    assert str(unlike("3060 3090 3090", "auto").layout) == "3x1"


def test_times_are_those_of_the_gpus_that_were_used(
    choose: tuple[Choose, list[str]],
    unlike: Callable[..., GroupConfig],
    records: StepRecords,
    tiny_z_image: Path,
) -> None:
    pair = "NVIDIA GeForce RTX 4090 and NVIDIA GeForce RTX 3090"
    for name, ms in ((KINDS["4090"].name, 5000.0), (pair, 80.0)):
        for _ in range(MIN_TIMES):
            records.add(str(tiny_z_image), name, SINGLE, Layout(1, 1, 2), ms)
    assert unlike("3090 4090", "2").devices == (1, 0)
    assert "1x2x1" in choose[1][-1]
    assert "80 ms measured" in choose[1][-1]


def test_a_model_that_cannot_share_tokens(gpu_count: ModuleType) -> None:
    info = SimpleNamespace(
        family=SimpleNamespace(shares_tokens=False),
        valid_tp_sizes=lambda **_: (1, 2),
        check_tp_size=lambda _: None,
    )
    assert list(map(str, gpu_count.possible_layouts("auto", None, info, 2))) == [
        "2x1",
        "1x1",
        "1x2",
    ]
    info.family.shares_tokens = True
    found = list(map(str, gpu_count.possible_layouts("auto", None, info, 2)))
    assert found == ["2x1", "1x1", "1x2", "1x2x1"]


def test_sharing_tokens_stays_where_it_was_slower_than_predicted(
    choose: tuple[Choose, list[str]],
    linked: Callable[[Link], None],
    records: StepRecords,
    tiny_z_image: Path,
) -> None:
    """Its times say how good predictions are; what else was measured decides against them."""
    on_machine, _ = choose
    linked(LINKS["pcie5-host"])
    measured(records, tiny_z_image, SINGLE, tp1x4x1=140.0)
    assert str(on_machine(4, "auto").layout) == "1x4x1"
    measured(records, tiny_z_image, SINGLE, tp4x1=100.0)
    assert str(on_machine(4, "4").layout) == "4x1"


def test_cfg_is_divided_first(
    choose: tuple[Choose, list[str]],
    linked: Callable[[Link], None],
    records: StepRecords,
    tiny_z_image: Path,
) -> None:
    on_machine, _ = choose
    linked(replace(LINKS["pcie5-host"], exchange_total=None))  # as measured
    measured(records, tiny_z_image, CFG, tp1x4x1=140.0)
    assert str(on_machine(4, "auto").layout) == "1x2x2"
    linked(LINKS["pcie5-host"])  # four that exchange at once are slower than two that do not
    assert str(on_machine(4, "auto").layout) == "1x2"


def test_on_the_cpu_nothing_is_predicted(
    choose: tuple[Choose, list[str]], records: StepRecords, tiny_z_image: Path
) -> None:
    on_machine, _ = choose
    assert str(on_machine(0, "2").layout) == "2x1"
    for layout, ms in ((Layout(2), 100.0), (Layout(1, 1, 2), 10.0)):
        for _ in range(MIN_TIMES):
            records.add(str(tiny_z_image), "cpu", SINGLE, layout, ms)
    assert str(on_machine(0, "2").layout) == "2x1"


@pytest.mark.parametrize(
    ("name", "peers", "link"),
    [
        ("NVIDIA H200", True, "nvlink"),
        ("NVIDIA H100 80GB HBM3", False, "pcie5-host"),
        ("NVIDIA GeForce RTX 4090", False, "pcie-host"),
        ("NVIDIA GeForce RTX 5090", False, "pcie5-host"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", True, "pcie5"),
        ("NVIDIA L40S", True, "pcie"),
    ],
)
def test_the_link_that_is_likely(
    monkeypatch: pytest.MonkeyPatch, links: LinkRecords, name: str, peers: bool, link: str
) -> None:
    kind = device_of(name) or by_architecture(name, A6000)
    monkeypatch.setattr(
        choice, "gpus_of", lambda gpus: [Gpu(one, name, 24 * GIB, kind) for one in gpus]
    )
    monkeypatch.setattr(choice, "gpu_names", lambda gpus: [f"{gpu} {name}" for gpu in gpus])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: peers)
    assert choice.link_between((0, 1), links) is LINKS[link]


def test_the_link_that_was_measured_decides(
    choose: tuple[Choose, list[str]], links: LinkRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine, warnings = choose
    monkeypatch.setattr(choice, "link_between", LINK_BETWEEN)
    monkeypatch.setattr(choice, "likely_link", lambda _: LINKS["pcie5-host"])
    monkeypatch.setattr(choice, "gpu_names", lambda gpus: [f"{gpu} {GPU}" for gpu in gpus])
    assert str(on_machine(2, "auto").layout) == "1x2x1"
    links.add([f"0 {GPU}", f"1 {GPU}"], LinkRates(300e9, 10e9, 5e-6))
    assert str(on_machine(2, "auto").layout) == "2x1"
    links.add([f"0 {GPU}", f"1 {GPU}"], LinkRates(1e9, 1e9, 5e-6))
    assert str(on_machine(2, "auto").layout) == "1x1"
    assert "measured on this machine: 1.0 GB/s in sums, 1.0 in exchanges" in warnings[-1]


@pytest.mark.parametrize(
    ("choice", "layout", "size"),
    [("auto", "2x2", (2, 2)), ("4", "2x2", (2, 2)), ("2", "1x2", (1, 2)), ("auto", "4x1", (4, 1))],
)
def test_an_explicit_layout(
    choose: tuple[Choose, list[str]], choice: str, layout: str, size: tuple[int, int]
) -> None:
    on_machine, warnings = choose
    group = on_machine(4, choice, layout=layout)
    assert (group.tp_size, group.batch_groups) == size
    assert not warnings


def test_a_layout_that_does_not_fit(
    gpu_count: ModuleType, choose: tuple[Choose, list[str]], tiny_z_image: Path
) -> None:
    on_machine, _ = choose
    with pytest.raises(ValueError, match=r"layout=2x2 takes 4 GPUs .*, but gpu_count is 2"):
        on_machine(4, "2", layout="2x2")
    with pytest.raises(
        DeviceError, match=r"layout is '2x2', which takes 4 GPUs, but .* 2 \(0, 1\)"
    ):
        on_machine(2, "auto", layout="2x2")
    # The page is told the same of every count: none of them helps.
    placement = gpu_count.Placement(layout="2x2")
    refused = gpu_count.refused_counts(None, placement)["refused"]
    assert len(refused) == gpu_count.MAX_GPU_COUNT
    assert len(set(refused.values())) == 1
    assert "Set layout to 'auto'" in refused["2"]
    refused_of_layout = refused["2"]
    refused = gpu_count.refused_counts(None, gpu_count.Placement(layout="2x1"))["refused"]
    assert refused.keys() == {"3", "4", "5", "6", "7", "8"}
    assert refused["3"].startswith("3 GPUs were asked for, but this machine shows 2")
    # On the node each reason stands once, and names no count that nobody has chosen.
    for layout, why in (
        ("2x2", [([*range(1, 9)], refused_of_layout)]),
        ("auto", [([*range(3, 9)], "This machine shows 2 GPUs (0, 1).")]),
    ):
        answer = gpu_count.refused_counts(None, gpu_count.Placement(layout=layout))
        assert [(one["counts"], one["reason"]) for one in answer["why"]] == why
    answer = gpu_count.refused_counts(str(tiny_z_image), gpu_count.Placement(layout="2x1"))
    assert answer["why"] == [
        {"counts": [1, *range(3, 9)], "reason": "The layout 2x1 takes 2 GPUs."}
    ]
    with pytest.raises(SizeError):
        on_machine(8, "auto", layout="7x1")
    with pytest.raises(ValueError, match="layout='3x3' is not in list"):
        on_machine(8, "auto", layout="3x3")


@pytest.mark.parametrize(
    ("in_cluster", "choice", "layout", "expected"),
    [
        (16, "auto", "auto", (8, "cuda", 1)),
        (4, "auto", "auto", (4, "cuda", 1)),
        (4, "4", "2x2", (2, "cuda", 2)),
        (0, "auto", "auto", (1, "cpu", 1)),
        (0, "2", "auto", (2, "cpu", 1)),
    ],
)
def test_on_ray_the_cluster_counts(
    gpu_count: ModuleType,
    choose: tuple[Choose, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    in_cluster: int,
    choice: str,
    layout: str,
    expected: tuple[int, str, int],
) -> None:
    """Not this machine, which has one GPU here."""
    on_machine, warnings = choose
    monkeypatch.setenv("TP_RUNTIME_RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(gpu_count, "cluster_gpu_count", lambda *_: in_cluster)
    group = on_machine(1, choice, layout=layout, where="ray")
    assert (group.tp_size, group.device, group.batch_groups) == expected
    assert (group.where, group.ray_address, group.devices) == ("ray", "10.0.0.1:6379", ())
    assert len(warnings) == (in_cluster == 0)


def test_on_ray_too_many_or_chosen(
    gpu_count: ModuleType, choose: tuple[Choose, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine, _ = choose
    monkeypatch.setenv("TP_RUNTIME_RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(gpu_count, "cluster_gpu_count", lambda *_: 2)
    with pytest.raises(
        DeviceError, match=r"4 GPUs were asked for, but the Ray cluster at 10\.0\.0\.1:6379 has 2"
    ):
        on_machine(8, "4", where="ray")
    with pytest.raises(DeviceError, match="Ray chooses the GPUs"):
        on_machine(8, "2", devices="0,1", where="ray")
    refused = gpu_count.refused_counts(None, gpu_count.Placement(where="ray"))
    assert sorted(refused["refused"]) == ["3", "4", "5", "6", "7", "8"]


def test_on_ray_of_this_machine(choose: tuple[Choose, list[str]]) -> None:
    """Without an address."""
    on_machine, _ = choose
    group = on_machine(2, "auto", where="ray")
    assert (group.tp_size, group.device, group.ray_address) == (2, "cuda", "")
