"""What is kept of how GPUs are connected, and how it is measured once."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_runtime.client.link import measure_link
from tp_runtime.config import GroupConfig
from tp_runtime.errors import GroupClosedError, GroupDiedError
from tp_runtime.gpu.speeds import host_times, speed_times
from tp_runtime.layouts.cost_model import (
    DEVICES,
    LINKS,
    NCCL_S,
    Device,
    Link,
    _attention_s,
    _product_s,
    device_of,
    nccl_s,
)
from tp_runtime.layouts.gpus import Gpu, best_first, by_architecture, devices_of
from tp_runtime.layouts.link_records import FILE, PASSES, LinkRates, LinkRecords, Speed
from tp_runtime.sharding.block_costs import AttentionCosts
from tp_runtime.sharding.plan import Split

GPUS = ["0 NVIDIA H100", "1 NVIDIA H100"]
RATES = LinkRates(25e9, 35e9, 5e-6)
FROM_HOST = LinkRates(25e9, 35e9, 5e-6, 12e9)
SMALL, LARGE = 2**16, 2**25
HOST_RATE = 12e9


def speed_of(device: Device, factor: float = 1.0) -> dict[str, float]:
    """What a rank on such a GPU answers, as the cost model has it; so many times as slow."""
    attention = AttentionCosts(Split(8, 128), Split(8, 128), 4096, 4096, 4096)
    return {
        "product_s": factor * _product_s(4096, 4096, 4096, device),
        "attention_s": factor * _attention_s(attention, 1, 1, 1, device),
        "sum_s": factor * PASSES * 3 * 2**26 / device.memory,
        "side": 4096,
        "heads": 8,
        "head_dim": 128,
        "added_bytes": 2**26,
        "multiprocessors": device.multiprocessors,
    }


def said(link: Link, num_ranks: int) -> list[dict[str, Any]]:
    """What ranks with such a link answer; the last one is the slowest."""
    sums = [nccl_s(size, num_ranks, link) for size in (SMALL, LARGE)]
    share = (num_ranks - 1) / num_ranks
    exchanges = [NCCL_S + share * size / link.exchange_rate for size in (SMALL, LARGE)]
    return [
        {
            "sizes": [SMALL, LARGE],
            "sums_s": [time * factor for time in sums],
            "exchanges_s": [time * factor for time in exchanges],
            "host": {"bytes": 2**26, "copy_s": factor * 2**26 / HOST_RATE},
            "speed": speed_of(DEVICES["RTX 4090"], factor),
        }
        for factor in (*[0.5] * (num_ranks - 1), 1.0)
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "link_records.json"


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", ["pcie-host", "pcie5"])
def test_rates_from_times(name: str, num_ranks: int) -> None:
    link = LINKS[name]
    found = LinkRates.of_ranks(said(link, num_ranks))
    assert found.rate == pytest.approx(link.rate, rel=1e-6)
    assert found.exchange_rate == pytest.approx(link.exchange_rate, rel=1e-6)
    assert found.hop_s == pytest.approx(link.hop_s, rel=1e-3)
    assert found.host_rate == pytest.approx(HOST_RATE)  # of the slowest


def test_times_that_cannot_be_give_rates_all_the_same() -> None:
    """A clock that jumped, or a GPU that did something else."""
    times = {"sizes": [SMALL, LARGE], "sums_s": [2e-3, 1e-3], "exchanges_s": [1e-6, 1e-6]}
    found = LinkRates.of_ranks([times, times])
    assert min(found.rate, found.exchange_rate) > 0
    assert found.hop_s >= 0


def test_a_link_with_what_was_measured() -> None:
    slow = RATES.on(LINKS["pcie"])
    assert (slow.rate, slow.exchange_rate, slow.hop_s, slow.fused) == (25e9, 35e9, 5e-6, False)
    assert "measured on this machine: 25.0 GB/s in sums, 35.0 in exchanges" in slow.source
    nvlink = RATES.on(LINKS["nvlink"])
    assert (nvlink.rate, nvlink.fused) == (LINKS["nvlink"].rate, True)
    assert nvlink.exchange_rate == 35e9
    assert slow.host_rate is nvlink.host_rate is None
    for name in ("pcie", "nvlink"):
        assert FROM_HOST.on(LINKS[name]).host_rate == 12e9
    assert FROM_HOST.on(LINKS["pcie"]).source.endswith(", 12.0 from the host")


@pytest.mark.parametrize("name", ["RTX 4090", "H200", "RTX 3060"])
def test_a_speed_explains_the_times(name: str) -> None:
    device = DEVICES[name]
    likely = DEVICES["RTX 3080"]
    found = Speed.of_rank(speed_of(device)).on(likely)
    for rate in ("matmul", "attention", "memory"):
        assert getattr(found, rate) == pytest.approx(getattr(device, rate), rel=1e-3)
    assert found.multiprocessors == device.multiprocessors
    assert (found.name, found.pcie, found.nvlink) == (likely.name, likely.pcie, likely.nvlink)
    assert "measured on this machine" in found.source


def test_a_speed_is_measured() -> None:
    """On the CPU, with small tensors."""
    speed = Speed.of_rank(speed_times(torch.device("cpu"), side=256))
    assert min(speed.matmul, speed.attention, speed.memory) > 1e6


def test_copies_from_the_host_are_measured() -> None:
    """On the CPU, within its memory."""
    found = host_times(torch.device("cpu"), size=2**16)
    assert found["bytes"] / found["copy_s"] > 1e6


def test_unknown_gpus_have_the_speed_that_was_measured(path: Path) -> None:
    """Without it, what is likely; the slowest of one name counts."""
    records, gpus = LinkRecords(path), ["0 NVIDIA Old", "1 NVIDIA New", "2 NVIDIA New"]
    speeds = [Speed.of_rank(speed_of(DEVICES["RTX 3090"], factor)) for factor in (1.0, 0.5, 0.6)]
    likely = replace(DEVICES["RTX 3080"], name="likely")
    on_machine = [Gpu(number, gpu[2:], 2**35, likely) for number, gpu in enumerate(gpus)]
    assert [gpu.number for gpu in best_first(on_machine, records.speeds())] == [0, 1, 2]
    old, h200 = on_machine[0], Gpu(3, "NVIDIA H200", 2**37, DEVICES["H200"])
    assert devices_of([old, h200, old], records.speeds()) == [likely, DEVICES["H200"]]
    records.add(gpus, RATES, speeds)
    found = LinkRecords(path).speeds()
    assert found == {"NVIDIA Old": speeds[0], "NVIDIA New": speeds[2]}
    assert [gpu.number for gpu in best_first(on_machine, found)] == [1, 2, 0]
    measured, known = devices_of([old, h200], found | {"NVIDIA H200": speeds[0]})
    assert measured.matmul == pytest.approx(DEVICES["RTX 3090"].matmul, rel=1e-3)
    assert known is DEVICES["H200"]


# Multiprocessors, MHz of them and of memory, bits of memory: what torch tells of such cards.
TOLD = {
    "NVIDIA GeForce RTX 3090": ((8, 6), 82, 1695, 9751, 384),
    "NVIDIA GeForce RTX 4090": ((8, 9), 128, 2520, 10501, 384),
    "NVIDIA GeForce RTX 5090": ((12, 0), 170, 2407, 14001, 512),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": ((12, 0), 188, 2617, 14001, 512),
    "NVIDIA H200": ((9, 0), 132, 1830, 3201, 6144),
}


def properties(
    capability: tuple[int, int], multiprocessors: int, clock: int, memory: int, bits: int
) -> SimpleNamespace:
    major, minor = capability
    return SimpleNamespace(
        major=major,
        minor=minor,
        multi_processor_count=multiprocessors,
        clock_rate=1000 * clock,
        memory_clock_rate=1000 * memory,
        memory_bus_width=bits,
    )


@pytest.mark.parametrize("name", TOLD)
def test_the_architecture_tells_what_data_sheets_do(name: str) -> None:
    found, known = by_architecture(name, properties(*TOLD[name])), device_of(name)
    assert known is not None
    for rate in ("matmul", "attention", "memory"):
        assert getattr(found, rate) == pytest.approx(getattr(known, rate), rel=0.03)
    assert (found.multiprocessors, found.pcie, found.nvlink) == (
        known.multiprocessors,
        known.pcie,
        known.nvlink,
    )


def test_cards_of_architectures_to_come_and_older_torch() -> None:
    of_newer = SimpleNamespace(major=13, minor=0, multi_processor_count=100)
    found = by_architecture("NVIDIA RTX 9999", of_newer)
    assert min(found.matmul, found.attention, found.memory) > 1e11
    assert (found.pcie, found.nvlink) == (5, False)
    half = by_architecture("NVIDIA GeForce RTX 9999", of_newer)
    assert half.matmul == pytest.approx(found.matmul / 2)
    a100 = SimpleNamespace(major=8, minor=0, multi_processor_count=108)
    assert by_architecture("NVIDIA A100-SXM4-80GB", a100).nvlink
    assert not by_architecture("NVIDIA A100 80GB PCIe", a100).nvlink


def test_another_process_finds_what_was_measured(path: Path) -> None:
    LinkRecords(path).add(GPUS, RATES)
    assert LinkRecords(path).between(GPUS) == RATES
    assert LinkRecords(path).between(reversed(GPUS)) == RATES


def test_gpus_are_told_apart(path: Path) -> None:
    records = LinkRecords(path)
    records.add(GPUS, RATES)
    assert records.between(["0 NVIDIA H100", "2 NVIDIA H100"]) is None
    assert records.between(["0 NVIDIA H200", "1 NVIDIA H200"]) is None


def test_some_of_the_gpus_tell_of_all(path: Path) -> None:
    """Until all were measured together."""
    records, four = LinkRecords(path), [*GPUS, "2 NVIDIA H100", "3 NVIDIA H100"]
    records.add(GPUS, RATES)
    assert records.between(four) == RATES
    assert not records.is_known(four)
    slower = LinkRates(22e9, 33e9, 5e-6)
    records.add(four, slower)
    assert records.between(four) == slower
    assert records.between(GPUS) == RATES


def test_a_record_of_before_the_hosts_memory_was_measured(path: Path) -> None:
    """The likely rate counts then; it is not measured again."""
    records = LinkRecords(path)
    records.add(GPUS, RATES)
    book = json.loads(path.read_text())
    (entry,) = book.values()
    del entry["rates"]["host_rate"]
    path.write_text(json.dumps(book))
    assert LinkRecords(path).between(GPUS) == RATES
    assert records.is_known(GPUS)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 3}', b"\xff"])
def test_a_file_that_is_not_ours_is_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    records = LinkRecords(path)
    assert records.between(GPUS) is None
    records.add(GPUS, RATES)
    assert LinkRecords(path).between(GPUS) == RATES


def test_rates_that_cannot_be_are_passed_over(path: Path) -> None:
    records = LinkRecords(path)
    records.add(GPUS, RATES)
    path.write_text(path.read_text().replace("25000000000.0", "-1"))
    assert records.between(GPUS) is None


class Engine:
    """Of a group of GPUs; each measurement takes the next of ``answers``, or raises it."""

    def __init__(self, config: GroupConfig, *answers: Any) -> None:
        self.config, self.answers, self.num_calls = config, list(answers), 0

    def call(self, *_: object, **__: object) -> Any:
        self.num_calls += 1
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tp_runtime.config.device_name", lambda _: "NVIDIA H100")


TWO = GroupConfig(2, "cuda", (0, 1))


def measure(engine: Any, records: LinkRecords) -> bool:
    return measure_link(engine, records, None)


def test_it_is_measured_once(path: Path) -> None:
    records, engine = LinkRecords(path), Engine(TWO, said(LINKS["pcie"], 2))
    measure(engine, records)
    measure(engine, LinkRecords(path))
    assert engine.num_calls == 1
    found = records.between(GPUS)
    assert found is not None
    assert found.rate == pytest.approx(LINKS["pcie"].rate)
    assert found.host_rate == pytest.approx(HOST_RATE)
    (speed,) = records.speeds().values()
    assert speed == Speed.of_rank(speed_of(DEVICES["RTX 4090"]))


@pytest.mark.parametrize(
    "config",
    [GroupConfig(2, "cpu"), GroupConfig(1, "cuda", (0,)), GroupConfig(2, "cuda", where="ray")],
    ids=["cpu", "one", "ray"],
)
def test_what_has_no_link_of_this_machine(path: Path, config: GroupConfig) -> None:
    engine = Engine(config)
    measure(engine, LinkRecords(path))
    assert engine.num_calls == 0


def test_what_cannot_be_written_is_not_tried_again_either(tmp_path: Path) -> None:
    nowhere = tmp_path / "file"
    nowhere.write_bytes(b"")
    links = LinkRecords(nowhere / FILE)
    links.begin(iter(GPUS))
    assert links.is_known(iter(GPUS))
    links.forget(iter(GPUS))
    assert not links.is_known(GPUS)


def test_what_ended_a_group_is_not_tried_again(path: Path) -> None:
    engine = Engine(TWO, GroupDiedError("rank 1 has ended"))
    assert not measure(engine, LinkRecords(path))
    assert measure(engine, LinkRecords(path))
    assert engine.num_calls == 1
    assert LinkRecords(path).between(GPUS) is None


@pytest.mark.parametrize("end", [KeyboardInterrupt, GroupClosedError])
def test_what_a_person_ended_is_tried_again(path: Path, end: type[BaseException]) -> None:
    """A cancelled prompt, and a group that was released: nobody wants another one for it."""
    engine = Engine(TWO, end(), said(LINKS["pcie"], 2))
    with pytest.raises(end):
        measure(engine, LinkRecords(path))
    measure(engine, LinkRecords(path))
    assert LinkRecords(path).between(GPUS) is not None
