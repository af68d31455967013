"""Weights that do not fit on their GPUs, and what that means for the layout that `auto` takes."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.extents import Extent
from bench.scaling import RESULTS
from tp_runtime import config, machine
from tp_runtime.config import ROOM_BYTES, Layout, fitting_weights
from tp_runtime.errors import SizeError
from tp_runtime.files.safetensors_file import TensorInfo
from tp_runtime.layouts import choice
from tp_runtime.layouts.choice import MIN_GAIN, Choice, choose_layout, native_workload
from tp_runtime.layouts.cost_model import DEVICES, LINKS, REQUEST_S, Device, Link, predict
from tp_runtime.layouts.gpus import Gpu
from tp_runtime.layouts.link_records import LinkRecords
from tp_runtime.layouts.room import Room, live_bytes, streamed_bytes
from tp_runtime.layouts.step_history import MIN_TIMES, StepRecords, Workload
from tp_runtime.models import families, family_named
from tp_runtime.recognise import CheckpointInfo

GIB = 2**30
CARD_24 = 25_250_000_000  # what torch says that an RTX 4090 has
TP, ONE, BATCH, SHARED = Layout(2), Layout(1), Layout(1, 2), Layout(1, 1, 2)
SHARING = sorted(name for name, family in families().items() if family.shares_tokens)


def published(model: str) -> CheckpointInfo:
    """The header of the model's file in bf16."""
    family = family_named(model)
    shapes = family.published.table.file_tensors
    tensors = {name: TensorInfo(shape, "BF16") for name, shape in shapes.items()}
    return CheckpointInfo(f"{model}.safetensors", family, family.published, tensors, {}, {})


Choose = Callable[..., Choice]


@pytest.fixture
def records(tmp_path: Path) -> StepRecords:
    return StepRecords(tmp_path / "step_records.json")


@pytest.fixture
def choose(
    tmp_path: Path, records: StepRecords, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Choose]:
    """`choose(model, memory, link, kind, layouts, host, itemsize)`: on two such cards."""
    monkeypatch.delenv("TP_RUNTIME_GPU_MEMORY", raising=False)

    def on_machine(
        model: str,
        memory: int = CARD_24,
        link: Link = LINKS["pcie-host"],
        kind: Device = DEVICES["RTX 4090"],
        layouts: Sequence[Layout] = (TP, ONE, BATCH, SHARED),
        host: int = 64 * GIB,
        itemsize: int | None = None,
    ) -> Choice:
        card = kind.name
        monkeypatch.setattr(
            choice, "gpus_of", lambda gpus: [Gpu(gpu, card, memory, kind) for gpu in gpus]
        )
        monkeypatch.setattr(choice, "link_between", lambda *_: link)
        monkeypatch.setattr(config, "device_name", lambda _: card)
        monkeypatch.setattr(machine, "memory", lambda: machine.Memory(host, host))
        num_gpus = max(layout.num_gpus for layout in layouts)
        links = LinkRecords(tmp_path / "link_records.json")
        return choose_layout(
            published(model), layouts, range(num_gpus), records, links, weight_itemsize=itemsize
        )

    return on_machine


# --- two cards of 24 GB on PCIe 4 without peer access ---------------------------------------------


def test_what_streaming_hides_behind_computing_costs_nothing(choose: Choose) -> None:
    """FLUX.1: 22 GiB, of which a card holds 20."""
    found = choose("flux")
    assert found.layout == SHARED
    assert found.reason is not None
    assert "Each GPU reads 2.2 GiB of its weights from the host's memory" in found.reason
    assert "407 ms predicted a step, and 2x1 takes 536 ms predicted" in found.reason


def test_what_weights_are_held_in_counts(choose: Choose) -> None:
    """FLUX.1 in fp8, whatever its file has: 11 GiB, which a card holds."""
    found = choose("flux", itemsize=1)
    assert found.layout == SHARED
    assert found.reason is not None
    assert "Each GPU reads" not in found.reason
    assert "Each GPU reads" in str(choose("flux", itemsize=2).reason)


def test_where_streaming_takes_longer_a_layout_that_fits_is_taken(choose: Choose) -> None:
    """Qwen-Image: `1x2x1` would read 18 of 38 GiB, which takes longer than the whole of `2x1`."""
    found = choose("qwen_image")
    assert found.layout == TP
    assert found.reason is not None
    assert "1x2x1 would be faster if its weights fitted: of 38.1 GiB, a GPU holds" in found.reason
    assert "Each GPU reads" not in found.reason


def test_a_card_full_of_weights_must_have_room_for_large_videos(choose: Choose) -> None:
    """Wan 14B at 720p; reading 6 of 27 GiB would be hidden, and `1x2x1` faster."""
    found = choose("wan")
    assert found.layout == TP
    assert found.reason is not None
    assert "1x2x1 would be faster if its weights fitted: of 26.6 GiB" in found.reason
    # Where nothing fits, all cards are full of weights.
    assert choose("wan", 12 * GIB).layout == SHARED


def test_a_slow_slot_decides_for_what_fits(choose: Choose) -> None:
    slow = replace(LINKS["pcie-host"], host_rate=4e9)
    assert choose("flux", link=slow).layout == TP


def test_where_nothing_fits_the_one_that_reads_less_may_be_faster(choose: Choose) -> None:
    found = choose("flux", 12 * GIB)
    assert found.layout == TP
    assert found.reason is not None
    assert "Each GPU reads 2.0 GiB" in found.reason
    assert "1x2x1 would be faster" in found.reason


def test_the_hosts_memory_is_not_filled_with_what_is_streamed(choose: Choose) -> None:
    assert choose("wan", 12 * GIB, host=32 * GIB).layout == TP
    assert choose("flux", host=3 * GIB).layout == TP


def test_what_a_person_leaves_for_weights_counts(
    choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more beside them, Wan has room for large videos."""
    monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", "16")
    assert choose("wan").layout == SHARED
    assert choose("flux").layout == SHARED
    monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", "12")
    assert choose("flux").layout == TP


def test_what_was_measured_stands_against_what_is_predicted(
    choose: Choose, records: StepRecords
) -> None:
    info = published("flux")
    for layout, ms in ((TP, 500.0), (SHARED, 700.0)):
        for _ in range(MIN_TIMES):
            records.add(info.path, "RTX 4090", native_workload(info), layout, ms)
    found = choose("flux", layouts=(TP, SHARED))
    assert (found.layout, found.reason) == (TP, None)


# --- cards that hold all of it --------------------------------------------------------------------


@pytest.mark.parametrize("model", ["flux", "wan", "qwen_image", "krea2"])
def test_where_all_layouts_fit_nothing_changes(choose: Choose, model: str) -> None:
    found = choose(model, 80 * GIB)
    assert found.layout == SHARED
    assert found.reason is not None
    assert "host's memory at every step" not in found.reason
    assert "if its weights fitted" not in found.reason
    nvlink = choose(model, 80 * GIB, LINKS["nvlink"], DEVICES["H100"])
    assert (nvlink.layout, nvlink.reason) == (TP, None)


def test_with_nvlink_a_default_that_streams_is_not_kept_though_slower(
    choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By 2 %, where one that fits would have to be faster by more than 3 %."""
    monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", "20")
    info, card = published("wan"), DEVICES["H100"]
    workload = native_workload(info)
    ms = predict(info.sizes, workload, TP, card).ms
    seconds = 1.02 * ms / 1e3 - REQUEST_S
    streamed = streamed_bytes("", info.sizes, 1, info.weight_bytes(2), 20 * GIB)
    link = replace(LINKS["nvlink"], host_rate=streamed / seconds)
    assert choose("wan", 80 * GIB, link, card, layouts=(SHARED, TP)).layout == TP


# --- whatever the machine -------------------------------------------------------------------------


@pytest.mark.parametrize("model", SHARING)
def test_no_layout_is_taken_that_streaming_makes_slower(choose: Choose, model: str) -> None:
    """Than one that fits, or, where none does, than one that reads less."""
    info = published(model)
    weights, workload = info.weight_bytes(2), native_workload(info)
    layouts = [TP, ONE, BATCH, SHARED, Layout(4), Layout(2, 1, 2), Layout(1, 1, 4)]
    for gib, link in itertools.product((8, 16, 24, 48), ("pcie-host", "pcie5", "nvlink")):
        gpus = [Gpu(number, "", gib * GIB, DEVICES["RTX 4090"]) for number in range(4)]
        rooms = {
            one: Room.on(gpus[: one.num_gpus], info.sizes, weights, one, workload)
            for one in layouts
        }
        times = {
            one: predict(
                info.sizes,
                workload,
                one,
                DEVICES["RTX 4090"],
                LINKS[link],
                streamed=room.streamed or 0,
            ).ms
            for one, room in rooms.items()
        }
        found = choose(model, gib * GIB, LINKS[link], layouts=layouts, host=2**50).layout
        fitting = [one for one in layouts if rooms[one].fits]
        if not rooms[found].fits:
            rivals = fitting or [one for one in layouts if rooms[one].streamed is not None]
            gain = MIN_GAIN if fitting else 0
            assert times[found] <= (1 - gain) * min(times[one] for one in rivals), (gib, link)


# --- what is read, and how long that takes --------------------------------------------------------


def test_bytes_and_times_as_measured() -> None:
    """On one H200, `bench/RESULTS.md`: GiB that a GPU may hold, GiB that it read, ms."""
    info = published("flux")
    for held, read, ms in ((14, 8.648, 174.4), (8, 14.625, 288.7), (None, 0, 123.4)):
        limit = None if held is None else held * GIB
        streamed = streamed_bytes("", info.sizes, 1, info.weight_bytes(2), limit)
        assert streamed / GIB == pytest.approx(read, rel=0.02)
        found = predict(info.sizes, Workload((1, 16, 128, 128), 512), ONE, streamed=streamed)
        assert found.ms == pytest.approx(ms, rel=0.15)
        assert (found.streaming > 0) == (read > 0)


def test_only_what_is_not_hidden_takes_time() -> None:
    sizes = family_named("flux").published
    case = sizes, Workload((1, 16, 128, 128), 512), TP

    def streaming(nbytes: float, link: Link) -> float:
        return predict(*case, link=link, streamed=nbytes).streaming

    link = replace(LINKS["nvlink"], host_rate=10e9)
    rest = predict(*case, link=link)
    assert streaming(10e9 * 0.3 * rest.ms / 1e3, link) < 0.01 * rest.ms
    # Of what takes as long, all the rest hides is not hidden.
    assert 0.1 * rest.ms < streaming(10e9 * rest.ms / 1e3, link) < 0.3 * rest.ms
    assert streaming(10e9, link) - streaming(5e9, link) == pytest.approx(500, rel=1e-3)
    # The slot is busy with sums where NVLink does not carry them.
    through_slot = replace(link, fused=False)
    links = predict(*case, link=through_slot).links
    without = streaming(10e9, replace(through_slot, rate=1e15, hop_s=0.0))
    assert links > 5
    assert streaming(10e9, through_slot) > without - links


def test_what_only_a_prompt_uses_is_not_read_in_a_step() -> None:
    """Wan's keys and values of a caption: 3.9 GiB of its 26.6."""
    info = published("wan")
    weights = info.weight_bytes(2)
    assert streamed_bytes("", info.sizes, 1, weights, weights - 3 * GIB) == 0
    gpu = Gpu(0, "", 26 * GIB, DEVICES["H200"])
    assert not Room.on([gpu], info.sizes, weights, ONE, native_workload(info)).fits
    assert streamed_bytes("", info.sizes, 1, weights, weights - 5 * GIB) > GIB


def test_what_cannot_be_streamed() -> None:
    info = published("flux")
    with pytest.raises(SizeError, match=r"FLUX\.1 needs at least"):
        streamed_bytes("FLUX.1", info.sizes, 2, info.weight_bytes(2), GIB // 10)
    gpu = Gpu(0, "", fitting := GIB + GIB // 10, DEVICES["H200"])
    workload = native_workload(info)
    room = Room.on([gpu], info.sizes, info.weight_bytes(2), TP, workload)
    assert fitting_weights(fitting, live_bytes(info.sizes, workload, TP)) == room.limit
    assert (room.streamed, room.fits, room.can_stream) == (None, False, False)


# --- what else needs room -------------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted(families()))
def test_what_a_model_is_made_for_has_room_beside_its_weights(model: str) -> None:
    """With the processes of the rank and of ComfyUI; more weights than that are streamed."""
    info = published(model)
    workload = native_workload(info)
    for gib, layout in itertools.product((12, 16, 24, 32, 48, 80), (ONE, TP, SHARED)):
        gpu = Gpu(0, "", gib * GIB, DEVICES["RTX 4090"])
        room = Room.on([gpu], info.sizes, info.weight_bytes(2), layout, workload)
        needed = live_bytes(info.sizes, workload, layout) + 2 * ROOM_BYTES
        assert 0 < room.limit <= gib * GIB - needed


def peaks() -> Iterator[tuple[str, Extent, int, Layout, float]]:
    """Of the measured rows: what a GPU held at most beside the weights, in GiB."""
    for path in sorted(RESULTS.glob("*.json")):
        for row in json.loads(path.read_text()):
            if row.get("where") == "comfyui" or not row["tp"] or row["optimize"] == "off":
                continue
            if row.get("references"):  # of which a workload does not know
                continue
            if row.get("peak_gib") and row.get("weights", "bf16") == "bf16":
                layout = Layout(row["tp"], row.get("batch_groups") or 1)
                extent = Extent.parse(str(row["side"]))
                beside = row["peak_gib"] - row["weights_gib"]
                yield row["model"], extent, row["batch"], layout, beside


def test_what_a_step_needs_is_not_taken_for_too_little() -> None:
    rows = [row for row in peaks() if row[-1] > 0.6]
    assert len({row[0] for row in rows}) > 6
    ratios = []
    for model, extent, batch, layout, measured in rows:
        family = family_named(model)
        workload = Workload((batch, *extent.latent_shape(family)), family.text_tokens)
        ratios.append(live_bytes(family.published, workload, layout) / GIB / measured)
    assert min(ratios) > 0.8
    assert max(ratios) < 2.3


@pytest.mark.parametrize("model", SHARING)
def test_sharing_tokens_divides_what_a_step_needs(model: str) -> None:
    workload = native_workload(published(model))
    sizes = family_named(model).published
    one, two = (live_bytes(sizes, workload, layout) for layout in (ONE, SHARED))
    assert 0.5 * one < two < one
    both = replace_batch(workload, 2)
    assert live_bytes(sizes, both, BATCH) == one < live_bytes(sizes, both, ONE)


def replace_batch(workload: Workload, batch: int) -> Workload:
    return Workload((batch, *workload.latent_shape[1:]), workload.text_tokens)


# --- GPUs that are not alike ----------------------------------------------------------------------


def test_the_faster_card_alone_where_the_other_would_slow_it_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """FLUX.1 fits on a 4090 and a 4060 Ti together, at half of the speed of the 4090 alone."""
    cards = [
        Gpu(number, f"NVIDIA GeForce {name}", int(gib * GIB * 0.985), DEVICES[name])
        for number, (name, gib) in enumerate((("RTX 4090", 24), ("RTX 4060 Ti", 16)))
    ]
    monkeypatch.setattr(choice, "gpus_of", lambda numbers: [cards[one] for one in numbers])
    monkeypatch.setattr(choice, "likely_link", lambda _: LINKS["pcie-host"])
    monkeypatch.setattr(config, "device_name", lambda gpu: cards[gpu].name)
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(64 * GIB, 64 * GIB))
    books = StepRecords(tmp_path / "steps.json"), LinkRecords(tmp_path / "links.json")
    info = published("flux")
    layouts = [TP, ONE, SHARED]
    found = choice.choose_layout(info, layouts, (0, 1), *books)
    assert (found.layout, found.gpus) == (ONE, (0,))
    assert "Larger latents may find no room beside them" in str(found.reason)
    for layout, ms in ((ONE, 690.0), (SHARED, 1420.0)):
        for _ in range(60):
            name = ",".join(card.name for card in cards[: layout.num_gpus])
            books[0].add(info.path, name, choice.native_workload(info), layout, ms)
    assert choice.choose_layout(info, layouts, (0, 1), *books).layout == ONE
