"""LTX-2 behind ComfyUI's own BaseModel: ComfyUI's class and ours, given the same conditioning.

ComfyUI 0.3.75 has no class for it, and says which release does.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from support.accuracy import FP32_TOLERANCE, relative_error
from support.ltx2_inputs import make_ltx2_inputs
from support.native import native_patcher
from support.newer import is_known
from support.pack import pack_module
from support.random_numbers import normal
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import CheckpointError, GroupConfig, get_runtime

pytestmark = pytest.mark.comfy
with_the_class = pytest.mark.skipif(not is_known("ltx2"), reason="needs ComfyUI 0.33's LTXAVModel")

SIZES = tiny("ltx2")
SIGMA = torch.tensor([0.7])
# Case → arguments of `make_ltx2_inputs`, and options as ComfyUI's nodes set them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text to video": ({}, {}),
    "without sound": ({"sound": 0}, {}),
    "image to video": ({"first": 0.0}, {}),
    "a mask": ({"spatial": True, "first": 0.5}, {}),
    "guides": ({"frames": 5, "guides": 2, "strengths": (0.5, 1.0), "masks": (9, None)}, {}),
    "a guide of few tokens": ({"frames": 4, "height": 4, "guides": 1, "dilated": True}, {}),
    "a voice": ({"reference": 3}, {}),
    "perturbed": ({}, {"stg_self_attn_blocks": {0, 1}}),
    "apart": ({}, {"a2v_cross_attn": False, "v2a_cross_attn": False}),
}


@pytest.fixture(scope="module")
def loading() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module
    get_runtime().release()


@pytest.fixture(scope="module")
def pair(loading: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """ComfyUI's BaseModel of a tiny file, and ours on two ranks."""
    path = write_tiny("ltx2", tmp_path_factory.mktemp("ltx2") / "tiny.safetensors")
    placement = loading.Placement()
    ours = loading.load_model(str(path), torch.float32, GroupConfig(2, "cpu"), placement, "auto")
    ours.remote.ensure_loaded()
    return native_patcher(path).model, ours.model


def predicted(model: Any, case: str, *, unprocessed: bool) -> torch.Tensor:
    """What a sampler is given, of a caption as the text encoder makes it."""
    import comfy.utils

    arguments, options = CASES[case]
    inputs = make_ltx2_inputs(SIZES, **arguments)
    packed, shapes = comfy.utils.pack_latents(inputs["x"])
    if len(shapes) == 1:
        packed = inputs["x"][0]
    given = {name: inputs[name] for name in inputs if name.endswith(("entries", "idxs", "audio"))}
    if "denoise_mask" in inputs:
        of_sound = [torch.ones_like(sound) for sound in inputs["x"][1:]]
        masks, _ = comfy.utils.pack_latents([inputs["denoise_mask"], *of_sound])
        given["denoise_mask"] = masks if of_sound else inputs["denoise_mask"]
    conds = model.extra_conds(
        device=torch.device("cpu"),
        noise=packed,
        cross_attn=normal((1, 9, 192), torch.Generator().manual_seed(5)),
        unprocessed_ltxav_embeds=unprocessed,
        latent_shapes=shapes,
        frame_rate=24.0,
        **given,
    )
    named = {name: cond.cond for name, cond in conds.items()}
    with torch.inference_mode():
        found: torch.Tensor = model.apply_model(
            packed, SIGMA, transformer_options=dict(options), **named
        )
    return found


@with_the_class
@pytest.mark.rotates(3)
@pytest.mark.parametrize("case", CASES)
def test_as_basemodel_calls_it(pair: tuple[Any, Any], case: str) -> None:
    native, ours = (predicted(model, case, unprocessed=True) for model in pair)
    assert relative_error(ours, native) <= FP32_TOLERANCE


@with_the_class
def test_a_caption_that_is_ready_stays_as_it_is(pair: tuple[Any, Any]) -> None:
    ready, ours = (predicted(model, "text to video", unprocessed=False) for model in pair)
    assert relative_error(ours, ready) <= FP32_TOLERANCE
    assert relative_error(predicted(pair[1], "text to video", unprocessed=True), ready) > 0.01


@pytest.mark.skipif(is_known("ltx2"), reason="this ComfyUI has the class")
def test_an_older_comfyui_says_which_release_knows_it(loading: ModuleType, tmp_path: Any) -> None:
    path = write_tiny("ltx2", tmp_path / "tiny.safetensors")
    group = GroupConfig(2, "cpu")
    with pytest.raises(CheckpointError, match=r"LTX-2 file .* Update ComfyUI: 0\.33 knows it"):
        loading.load_model(str(path), torch.float32, group, loading.Placement(), "auto")
