"""A family that only this folder knows: from a file to the ranks, equal to its plain module."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from new_family.family import FAMILY
from new_family.plain import Plain
from support.accuracy import FP32_TOLERANCE, relative_error
from support.tiny_models import write
from tp_runtime.client import GroupConfig, InputError, ModelSpec, Runtime, inspect_checkpoint
from tp_runtime.config import Layout
from tp_runtime.layouts.cost_model import predict
from tp_runtime.layouts.step_history import Workload

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
LIMITS = {"family.py": 82, "forward.py": 150}


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    """The package is found by this process and by the ranks, and named as a family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_FAMILIES", "new_family")
        patch.setenv("PYTHONPATH", str(HERE.parent))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "example.safetensors"
    return write(path, FAMILY.small.table.file_tensors)


def make_inputs(batch: int, frames: int, height: int, width: int, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch + frames + height)
    tokens = frames * height * width // 4
    return {
        "x": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timesteps": torch.rand(batch, tokens, generator=generator),
        "context": torch.randn(batch, length, 40, generator=generator),
    }


def plain(path: Path, inputs: dict[str, Any]) -> torch.Tensor:
    model, file = Plain(FAMILY.small), load_file(path)
    places = FAMILY.small.table.places
    weights = {name: file[place.name][place.start : place.stop] for name, place in places.items()}
    model.load_state_dict(weights)
    with torch.inference_mode():
        result: torch.Tensor = model(**inputs)
    return result


# On three ranks, nine heads of the cross-attention, of which one is padding, and 321 of the MLP.
@pytest.mark.parametrize("tp_size", [2, 3])
@pytest.mark.parametrize("case", [(1, 3, 4, 6, 7), (2, 1, 8, 4, 1)], ids=str)
def test_equals_the_plain_module(
    runtime: Runtime, checkpoint: Path, tp_size: int, case: tuple[int, ...]
) -> None:
    spec = ModelSpec.of(str(checkpoint), "float32", "float32")
    model = runtime.model(spec, GroupConfig(tp_size, "cpu"))
    model.ensure_loaded()
    inputs = make_inputs(*case)
    found = model.evaluate(inputs)
    assert relative_error(found, plain(checkpoint, inputs)) <= FP32_TOLERANCE
    with pytest.raises(InputError, match=r"Timesteps of Example .* \(batch, positions\)"):
        model.evaluate(inputs | {"timesteps": torch.zeros(case[0])})


def test_what_follows_from_the_table(checkpoint: Path) -> None:
    info = inspect_checkpoint(str(checkpoint))
    assert (info.family, info.sizes) == (FAMILY, FAMILY.small)
    # 6 key and value heads, and 8 heads that may be padded by one at most.
    assert info.valid_tp_sizes() == (1, 2, 3)
    shape = (2, *info.sizes.geometry.latent_shape(64, 64, frames=9))
    assert shape == (2, 4, 3, 8, 8)
    cost = predict(info.sizes, Workload(shape, 7), Layout(2))
    assert 0 < cost.attention < cost.ms


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_it_stays_small(name: str, limit: int) -> None:
    assert len((HERE / name).read_text().splitlines()) <= limit
