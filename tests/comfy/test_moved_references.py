"""Pictures that a model looks at, moved by `rope_options` as the running ComfyUI moves them.

0.33 moves them with the image; 0.3.75 moves the image alone.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.accuracy import FP32_TOLERANCE, relative_error
from support.inputs import make_inputs
from support.native import native_patcher
from support.pack import pack_module
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import GroupConfig, get_runtime

pytestmark = pytest.mark.comfy

ROPE = {"scale_x": 1.5, "scale_y": 0.75, "shift_x": 2.0, "shift_y": -1.0, "shift_t": 3.0}


@pytest.fixture(scope="module")
def loading() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module
    get_runtime().release()


def predicted(patcher: Any, family: str, options: dict[str, Any]) -> torch.Tensor:
    inputs = make_inputs(tiny(family), height=6, width=7, references=((5, 4), (3, 9)))
    x, times = inputs.pop("x"), inputs.pop("timesteps")
    with torch.inference_mode():
        model = patcher.model.diffusion_model
        found: torch.Tensor = model(x, times, **inputs | {"transformer_options": options})
    return found


@pytest.mark.parametrize("family", ["flux", "flux2"])
def test_as_the_running_comfyui(loading: ModuleType, tmp_path: Path, family: str) -> None:
    path = write_tiny(family, tmp_path / "tiny.safetensors")
    placement = loading.Placement()
    ours = loading.load_model(str(path), torch.float32, GroupConfig(2, "cpu"), placement, "auto")
    ours.remote.ensure_loaded()
    stock = native_patcher(path)
    for options in ({"rope_options": ROPE}, {}):
        expected = predicted(stock, family, dict(options))
        assert relative_error(predicted(ours, family, options), expected) <= FP32_TOLERANCE
