"""The times of samplers' steps, which outlive the process."""

import errno
from pathlib import Path

import pytest

from tp_runtime.config import Layout
from tp_runtime.layouts.step_history import (
    KEPT_MODELS,
    KEPT_SHAPES,
    KEPT_TIMES,
    MIN_TIMES,
    USUAL_STEPS,
    StepRecords,
    Workload,
    times_of,
)

MODEL, GPU = "/models/a.safetensors", "NVIDIA H200"
CFG = Workload((2, 16, 128, 128), 77)
SINGLE = Workload((1, 16, 128, 128), 77)
PLAIN, MIXED = Layout(4), Layout(2, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "step_records.json"


def add(records: StepRecords, workload: Workload, layout: Layout, *times: float) -> None:
    for ms in times:
        records.add(MODEL, GPU, workload, layout, ms)


def test_another_process_finds_what_was_recorded(path: Path) -> None:
    records = StepRecords(path)
    add(records, CFG, PLAIN, 400.0, 90.0, 72.0, 71.0)
    add(records, CFG, MIXED, 61.0, 60.0, 62.0, 63.0)
    records.save()
    later = StepRecords(path)
    assert later.usual_workload(MODEL, GPU) == CFG
    assert later.times(MODEL, GPU, CFG) == {PLAIN: 71.0, MIXED: 60.0}


def test_models_devices_and_shapes_are_told_apart(path: Path) -> None:
    records = StepRecords(path)
    add(records, CFG, PLAIN, *[70.0] * MIN_TIMES)
    assert records.times(MODEL, GPU, SINGLE) == {}
    assert records.times(MODEL, "cpu", CFG) == {}
    assert records.usual_workload("/models/b.safetensors", GPU) is None


def test_times_of_weights_in_8_bits_and_of_a_limit_are_kept_apart(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert times_of("GPU", "exact") == times_of("GPU", "exact", 4) == "GPU"
    names = [times_of("GPU", "exact"), times_of("GPU", "exact", 1), times_of("GPU", "fast", 1)]
    monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", "7.5")
    names += [times_of("GPU", "exact"), times_of("GPU", "exact", 1)]
    assert len({*names}) == 5
    assert names[-1] == "GPU, weights in 8 bits, 7.5 GiB of them a GPU"
    records = StepRecords(path)
    for name in names[:2]:
        for _ in range(MIN_TIMES):
            records.add(MODEL, name, CFG, Layout(2), 10.0 * len(name))
    assert records.times(MODEL, names[1], CFG) == {Layout(2): 10.0 * len(names[1])}


def test_a_few_steps_say_nothing(path: Path) -> None:
    """The first ones compile and record."""
    records = StepRecords(path)
    add(records, CFG, PLAIN, *[70.0] * (MIN_TIMES - 1))
    assert records.times(MODEL, GPU, CFG) == {}


def test_old_times_are_forgotten(path: Path) -> None:
    records = StepRecords(path)
    add(records, CFG, PLAIN, 50.0, *[70.0] * KEPT_TIMES)
    assert records.times(MODEL, GPU, CFG) == {PLAIN: 70.0}


def test_shapes_that_were_used_long_ago_are_forgotten(path: Path) -> None:
    records = StepRecords(path)
    shapes = [Workload((1, 16, 128, 8 * n), 77) for n in range(1, KEPT_SHAPES + 2)]
    for workload in shapes:
        add(records, workload, PLAIN, *[70.0] * MIN_TIMES)
        add(records, shapes[0], PLAIN, 70.0)  # in use
    found = [workload for workload in shapes if records.times(MODEL, GPU, workload)]
    assert found == [shapes[0], *shapes[2:]]


def test_models_that_were_used_long_ago_are_forgotten(path: Path) -> None:
    names = [f"/models/{number}.safetensors" for number in range(KEPT_MODELS + 1)]
    for name in [*names, names[0]]:
        records = StepRecords(path)  # each in a process of its own
        records.add(name, GPU, CFG, PLAIN, 70.0)
        records.save()
    found = [name for name in names if StepRecords(path).usual_workload(name, GPU)]
    assert found == [names[0], *names[2:]]


def test_a_full_disk_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    records = StepRecords(path)
    add(records, CFG, PLAIN, 70.0)
    kept = path.read_bytes()
    monkeypatch.setattr(Path, "replace", full)
    records.save()
    assert path.read_bytes() == kept
    assert list(path.parent.iterdir()) == [path]


def test_what_is_usual_changes_slowly(path: Path) -> None:
    records = StepRecords(path)
    add(records, CFG, PLAIN, 70.0)
    add(records, SINGLE, PLAIN, *[40.0] * (USUAL_STEPS - 1))
    assert records.usual_workload(MODEL, GPU) == CFG
    add(records, SINGLE, PLAIN, 40.0)
    assert records.usual_workload(MODEL, GPU) == SINGLE


def test_the_devices_that_were_used_last_tell(path: Path) -> None:
    """GPUs that are not alike have other names in layouts that take fewer of them."""
    records, both, one = StepRecords(path), "RTX 5090 and RTX 3090", "RTX 5090"
    assert records.usual_workload(MODEL, both, one) is None
    records.add(MODEL, both, SINGLE, PLAIN, 300.0)
    records.add(MODEL, one, CFG, Layout(1), 900.0)
    assert records.usual_workload(MODEL, both, one) == CFG
    records.save()
    later = StepRecords(path)
    assert later.usual_workload(MODEL, both, one) == CFG
    later.add(MODEL, both, SINGLE, PLAIN, 300.0)
    assert later.usual_workload(MODEL, one, both) == SINGLE
    assert later.usual_workload(MODEL, one) == CFG


def test_alternating_workloads_change_nothing(path: Path) -> None:
    """Each change would cost a group's start and a load."""
    records = StepRecords(path)
    for _ in range(10):
        add(records, CFG, PLAIN, *[70.0] * 20)
        add(records, SINGLE, PLAIN, *[40.0] * 20)
        assert records.usual_workload(MODEL, GPU) == CFG


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"[1]", b'{"a": {"usual": 3}}', b"\xff", b'{"\xff": {}}'],
)
def test_a_file_that_is_not_ours_is_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    records = StepRecords(path)
    assert records.usual_workload(MODEL, GPU) is None
    add(records, CFG, PLAIN, 70.0)
    records.save()
    assert StepRecords(path).usual_workload(MODEL, GPU) == CFG


def test_two_processes_keep_each_others_models(path: Path) -> None:
    one, other = StepRecords(path), StepRecords(path)
    one.add(MODEL, GPU, CFG, PLAIN, 70.0)
    other.add("/models/b.safetensors", GPU, CFG, PLAIN, 70.0)
    one.save()
    other.save()
    assert StepRecords(path).usual_workload(MODEL, GPU) == CFG


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    records = StepRecords(tmp_path / "file" / "step_records.json")
    add(records, CFG, PLAIN, 70.0)
    records.save()
    assert records.usual_workload(MODEL, GPU) == CFG


@pytest.mark.parametrize("layout", ["tp2", "0x9", "2x0", "2x", "-1x2"])
def test_a_layout_that_cannot_be_is_passed_over(path: Path, layout: str) -> None:
    """As another release may have written it; what is beside it counts."""
    records = StepRecords(path)
    add(records, CFG, PLAIN, *[70.0] * MIN_TIMES)
    records.save()
    path.write_text(
        path.read_text().replace('"4x1": [', f'"{layout}": [1.0,1.0,1.0,1.0], "4x1": [')
    )
    assert StepRecords(path).times(MODEL, GPU, CFG) == {PLAIN: 70.0}


@pytest.mark.parametrize(
    "usual",
    ["null", "[]", '{"latent_shape": [], "text_tokens": 1}', '{"latent_shape": [1,2,0,4]}'],
)
def test_an_entry_of_another_form_is_passed_over(path: Path, usual: str) -> None:
    records = StepRecords(path)
    add(records, CFG, PLAIN, *[70.0] * MIN_TIMES)
    records.save()
    odd = f'"other on {GPU}": {{"usual": {usual}}},'
    path.write_text(path.read_text().replace("{", "{" + odd, 1))
    assert StepRecords(path).usual_workload(MODEL, GPU) == CFG
    assert StepRecords(path).usual_workload("other", GPU) is None
