"""What a person is told of a model that its GPUs cannot hold."""

from pathlib import Path
from types import ModuleType

import pytest

from support.pack import pack_module
from tp_runtime.client import GroupReport

pytestmark = pytest.mark.comfy

GIB = 2**30


@pytest.mark.parametrize("gpu_count", ["1", "2"])
def test_the_loader_says_how_much_stays_with_the_host(
    loader: ModuleType,
    file_of_loader: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpu_count: str,
) -> None:
    """Before anything starts; and nothing where all of it fits."""
    node, share = loader.TPLoadDiffusionModel, file_of_loader.stat().st_size / int(gpu_count)

    def load(gpu_memory: float) -> tuple[str, int]:
        """What it warns of, and how large ComfyUI takes the model to be."""
        caplog.clear()
        monkeypatch.setenv("TP_RUNTIME_GPU_MEMORY", str(gpu_memory / GIB))
        (model,) = node.execute(unet_name="x", weight_dtype="fp32", gpu_count=gpu_count).result
        return caplog.text, model.model_size()

    said, size = load(0.25 * share)
    whole, streamed = (f"{share * part / 2**20:.1f} MiB" for part in (1, 0.75))
    assert f"part of the weights, {whole}, about {streamed} stay in the host's memory" in said
    assert size == pytest.approx(0.25 * share * int(gpu_count), rel=0.01)
    said, size = load(1.1 * share)
    assert "host's memory" not in said
    assert size == pytest.approx(share * int(gpu_count), rel=0.01)


def test_the_info_node_shows_it() -> None:
    held = {"bytes": [8 * GIB, 8 * GIB], "streamed": [3 * GIB, 3 * GIB], "asleep": False}
    models = {"flux.safetensors@1": held, "wan.safetensors@2": held | {"streamed": [0, 0]}}
    report = GroupReport("1", "ready", 2, 1, 1, "cuda", (0, 1), "python", None, models)
    with pack_module("nodes.runtime_nodes") as nodes:
        assert nodes._summary(report).splitlines() == [
            "2 GPUs: ready",
            "flux.safetensors: 8.0 GiB each + 3.0 GiB in the host's memory",
            "wan.safetensors: 8.0 GiB each",
        ]
