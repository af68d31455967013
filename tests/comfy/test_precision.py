"""What a person asks for as `precision`: a model of its own, and a word on the node."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from support.pack import pack_module
from tp_runtime.client import GroupReport
from tp_runtime.config import Layout
from tp_runtime.layouts.step_history import MIN_TIMES, StepRecords, Workload, times_of

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("gpu_count", ["1", "2"])
@pytest.mark.usefixtures("file_of_loader")
def test_the_loader_says_what_fast_costs(
    loader: ModuleType, caplog: pytest.LogCaptureFixture, gpu_count: str
) -> None:
    """And nothing of a single process, or of a prompt that does not ask for it."""
    node = loader.TPLoadDiffusionModel

    def load(**precision: str):
        caplog.clear()
        (model,) = node.execute(unet_name="x", gpu_count=gpu_count, **precision).result
        return model.remote

    found = {name: load(precision=name) for name in ("exact", "fast")}
    said = "differs from that of 'exact' by up to about 1 %" in caplog.text
    assert said == (gpu_count == "2")
    assert {name: one.spec.precision for name, one in found.items()} == {
        "exact": "exact",
        "fast": "fast",
    }
    assert found["exact"].name != found["fast"].name
    assert found["exact"].group_id == found["fast"].group_id
    assert load().name == found["exact"].name
    assert "precision" not in caplog.text
    with pytest.raises(ValueError, match="precision='8 bit' is not in list: choose one of exact,"):
        load(precision="8 bit")


@pytest.mark.usefixtures("file_of_loader")
def test_a_sampler_with_a_count_of_its_own_keeps_it(
    loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = loader.TPLoadDiffusionModel
    (model,) = node.execute(unet_name="x", gpu_count="1", precision="fast").result
    with pack_module("nodes.sampler") as sampler:
        monkeypatch.setattr(sampler.TPSampler, "hidden", SimpleNamespace(unique_id="8"))
        other = sampler.TPSampler._on_group(model, "2")
    assert (other.remote.spec.precision, other.remote.group_config.num_ranks) == ("fast", 2)


@pytest.mark.usefixtures("file_of_loader")
def test_groups_that_a_sampler_has_left_have_no_user(
    loader: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last ones, which a graph with several samplers comes back to."""
    (model,) = loader.TPLoadDiffusionModel.execute(unet_name="x", gpu_count="1").result
    with pack_module("nodes.sampler") as sampler:
        monkeypatch.setattr(sampler.TPSampler, "hidden", SimpleNamespace(unique_id="8"))
        for count in ("2", "3", "4", "3"):
            other = sampler.TPSampler._on_group(model, count)
    kept = [group.num_ranks for group in other.model.tp_on_other_groups]
    assert kept == []
    assert [group.num_ranks for group in model.model.tp_on_other_groups] == [4, 3]


def test_times_of_both_are_kept_apart(tmp_path: Path) -> None:
    """`auto` goes by those of the precision that is asked for."""
    records, workload = StepRecords(tmp_path / "steps.json"), Workload((1, 16, 16, 16), 5)
    for _ in range(MIN_TIMES):
        records.add("file", times_of("GPU", "fast"), workload, Layout(2), 50.0)
    assert records.times("file", times_of("GPU", "fast"), workload) == {Layout(2): 50.0}
    assert records.times("file", times_of("GPU", "exact"), workload) == {}


def test_the_info_node_shows_what_the_ranks_do() -> None:
    held = {"bytes": [8 * 2**30] * 2, "streamed": [0, 0], "asleep": False}
    models = {"flux.safetensors@1": held, "flux.safetensors@2": held}
    said = {"flux.safetensors@1": {"precision": "exact"}, "flux.safetensors@2": {}}
    ranks = [{"models": said}, {"models": said | {"flux.safetensors@2": {"precision": "fast"}}}]
    report = GroupReport("1", "ready", 2, 1, 1, "cuda", (0, 1), "python", None, models, ranks=ranks)
    with pack_module("nodes.runtime_nodes") as nodes:
        assert nodes._summary(report).splitlines() == [
            "2 GPUs: ready",
            "flux.safetensors: 8.0 GiB each",
            "flux.safetensors: 8.0 GiB each, 8 bits between the GPUs",
        ]
