"""How often a load reads the file's header, which may lie on a slow disk."""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from support.tiny_models import write_tiny
from tp_runtime.client import inspection
from tp_runtime.recognise import CheckpointInfo, inspect_checkpoint

pytestmark = pytest.mark.comfy


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose headers are read during the test."""
    paths: list[str] = []

    def spy(path: str) -> CheckpointInfo:
        paths.append(path)
        return inspect_checkpoint(path)

    monkeypatch.setattr(inspection, "inspect_checkpoint", spy)
    return paths


def test_a_load_reads_the_header_once_and_a_replaced_file_again(
    loader: ModuleType, inspected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ComfyUI does in a prompt: it asks for the fingerprint, then it runs the node."""
    path = write_tiny("z_image", tmp_path / "model.safetensors", seed=1)
    node = loader.TPLoadDiffusionModel
    monkeypatch.setattr(loader, "model_path", lambda _: str(path))
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None))

    def load() -> CheckpointInfo:
        chosen = {"unet_name": "x", "weight_dtype": "default", "gpu_count": "1"}
        node.fingerprint_inputs(**chosen)
        (model,) = node.execute(**chosen).result
        info: CheckpointInfo = model.remote.info
        return info

    first = load()
    assert inspected == [str(path)]
    assert load() is first
    assert len(inspected) == 1
    write_tiny("z_image", path.with_suffix(".new"), seed=2).rename(path)
    assert load() is not first
    assert len(inspected) == 2
