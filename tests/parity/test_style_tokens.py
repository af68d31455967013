"""Tokens before the text (USO's style references), on real ranks against ComfyUI's model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import FP32_TOLERANCE, Remote, relative_error

from support.inputs import make_inputs
from support.native import import_comfy, native_model
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import STYLE_TOKENS, InputError

pytestmark = pytest.mark.process

WIDTH = tiny("flux").dim


def styles(batch: int, *counts: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(batch, count, WIDTH, generator=generator) for count in counts]


def native(path: Path, inputs: dict[str, Any], tokens: list[torch.Tensor]) -> torch.Tensor:
    """With an object of ComfyUI's for each, whose small model has made the tokens already."""
    import_comfy()
    from types import SimpleNamespace

    from comfy_extras.nodes_model_patch import UsoStyleProjectorPatch

    def making(made: torch.Tensor) -> Any:
        patch = SimpleNamespace(model=lambda _: made)
        return UsoStyleProjectorPatch(patch, made)

    options = {"patches": {"post_input": [making(one) for one in tokens]}}
    named = inputs | {"transformer_options": options}
    with torch.inference_mode():
        return native_model(path)(named.pop("x"), named.pop("timesteps"), **named)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("flux", tmp_path_factory.mktemp("flux") / "model.safetensors")


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_as_in_comfyui(remote: Remote, path: Path, layout: tuple[int, int, int]) -> None:
    tp_size, batch_groups, sequence_size = layout
    model = remote(path, tp_size, torch.float32, batch_groups, sequence_size)
    for batch, counts in ((1, (12,)), (2, (5, 12))):
        inputs = make_inputs(tiny("flux"), batch=batch, references=((9, 8),))
        tokens = styles(batch, *counts)
        found = model.evaluate(inputs | {STYLE_TOKENS: tokens})
        assert relative_error(found, native(path, inputs, tokens)) <= FP32_TOLERANCE
        assert relative_error(found, model.evaluate(inputs)) > 0.01


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 12, WIDTH + 2), rf"Style tokens of FLUX.1 .* width {WIDTH}.* projector"),
        ((2, 12, WIDTH), "1 latents need as many style tokens; got 2"),
    ],
)
def test_what_does_not_fit(remote: Remote, path: Path, shape: tuple[int, ...], words: str) -> None:
    inputs = make_inputs(tiny("flux")) | {STYLE_TOKENS: [torch.zeros(shape)]}
    with pytest.raises(InputError, match=words):
        remote(path, 2).evaluate(inputs)
