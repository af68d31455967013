"""LTX-2 behind ComfyUI's own BaseModel: ComfyUI's class and ours, given the same conditioning.

And in ComfyUI's own sampler, in two stages with its latent upsampler between them.

ComfyUI 0.3.75 has no class for it, and says which release does.
"""

import os
import signal
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from support.accuracy import FP32_TOLERANCE, relative_error
from support.lora_files import factors
from support.ltx2_inputs import make_ltx2_inputs
from support.native import native_patcher
from support.newer import is_known
from support.pack import pack_module
from support.random_numbers import normal
from support.tiny_models import tiny, tiny_shapes, write_tiny
from tp_runtime.client import CheckpointError, GroupConfig, GroupDiedError, get_runtime

pytestmark = pytest.mark.comfy
with_the_class = pytest.mark.skipif(not is_known("ltx2"), reason="needs ComfyUI 0.33's LTXAVModel")

SIZES = tiny("ltx2")
SIGMA = torch.tensor([0.7])
# Largest difference from the stock result, relative to its standard deviation.
TOLERANCE = 1e-5
# Case → arguments of `make_ltx2_inputs`, and options as ComfyUI's nodes set them.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text to video": ({}, {}),
    "without sound": ({"sound": 0}, {}),
    "image to video": ({"first": 0.0}, {}),
    "a mask": ({"spatial": True, "first": 0.5}, {}),
    "guides": ({"frames": 5, "guides": 2, "strengths": (0.5, 1.0), "masks": (9, None)}, {}),
    "a guide of few tokens": ({"frames": 4, "height": 4, "guides": 1, "dilated": True}, {}),
    "a window without guides": ({"first": 0.0, "keyframe_idxs": torch.zeros(1, 3, 0, 2)}, {}),
    "a voice": ({"reference": 3}, {}),
    "a voice without sound": ({"reference": 3, "sound": 0}, {}),
    "perturbed": ({}, {"stg_self_attn_blocks": {0, 1}}),
    "apart": ({}, {"a2v_cross_attn": False, "v2a_cross_attn": False}),
}


@pytest.fixture(scope="module")
def loading() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module
    get_runtime().release()


@pytest.fixture(scope="module")
def patchers(loading: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """ComfyUI's MODEL of a tiny file, and ours on two ranks."""
    path = write_tiny("ltx2", tmp_path_factory.mktemp("ltx2") / "tiny.safetensors")
    placement = loading.Placement()
    ours = loading.load_model(str(path), torch.float32, GroupConfig(2, "cpu"), placement, "auto")
    ours.remote.ensure_loaded()
    return native_patcher(path), ours


@pytest.fixture(scope="module")
def pair(patchers: tuple[Any, Any]) -> tuple[Any, Any]:
    """Their BaseModels."""
    stock, ours = patchers
    return stock.model, ours.model


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
@pytest.mark.rotates(5)
@pytest.mark.parametrize("case", CASES)
def test_as_basemodel_calls_it(pair: tuple[Any, Any], case: str) -> None:
    native, ours = (predicted(model, case, unprocessed=True) for model in pair)
    assert relative_error(ours, native) <= FP32_TOLERANCE


@with_the_class
def test_a_caption_that_is_ready_stays_as_it_is(pair: tuple[Any, Any]) -> None:
    ready, ours = (predicted(model, "text to video", unprocessed=False) for model in pair)
    assert relative_error(ours, ready) <= FP32_TOLERANCE
    assert relative_error(predicted(pair[1], "text to video", unprocessed=True), ready) > 0.01


# --- in a sampler ---------------------------------------------------------------------------------


def sampled(
    patcher: Any,
    video: torch.Tensor,
    sound: torch.Tensor,
    sigmas: tuple[float, ...],
    *,
    seed: int = 5,
    kept: float = 1.0,
    callback: Callable[..., None] | None = None,
) -> list[torch.Tensor]:
    """Video and sound after steps of ComfyUI's KSampler; `kept`: how much of the first frame is
    made anew, as image to video has it.
    """
    import comfy.sample
    from comfy.nested_tensor import NestedTensor

    generator = torch.Generator().manual_seed(seed)
    noise = NestedTensor(tuple(normal(tuple(one.shape), generator) for one in (video, sound)))
    of_video, of_sound = torch.ones(1, 1, *video.shape[2:]), torch.ones(1, 1, *sound.shape[2:])
    of_video[:, :, 0] = kept
    said = {"unprocessed_ltxav_embeds": True, "frame_rate": 24.0}
    captions = [[[normal((1, length, 192), generator), dict(said)]] for length in (9, 7)]
    found = comfy.sample.sample(
        patcher,
        noise,
        len(sigmas) - 1,
        1.0,
        "euler",
        "simple",
        *captions,
        NestedTensor((video, sound)),
        noise_mask=NestedTensor((of_video, of_sound)),
        sigmas=torch.tensor(sigmas),
        seed=seed,
        callback=callback,
        disable_pbar=True,
    )
    return list(found.unbind())


FIRST, SECOND = (1.0, 0.7, 0.3, 0.0), (0.6, 0.25, 0.0)
VIDEO, SOUND = torch.zeros(1, 128, 3, 2, 3), torch.zeros(1, 8, 5, 16)


def upsampled(video: torch.Tensor) -> torch.Tensor:
    """By ComfyUI's model for it, of few channels."""
    import comfy.ops
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler

    model = LatentUpsampler(comfy.ops.disable_weight_init, 128, 32, num_blocks_per_stage=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        per = max(1, parameter[0].numel())
        parameter.data = normal(tuple(parameter.shape), generator) / per**0.5
    with torch.inference_mode():
        found: torch.Tensor = model(video)
    return found / found.std()


def in_two_stages(patcher: Any, lora: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A picture as the first frame; a LoRA distils the second stage, as templates have it."""
    import comfy.sd

    picture = VIDEO.clone()
    picture[:, :, 0] = normal((1, 128, 2, 3), torch.Generator().manual_seed(9))
    video, sound = sampled(patcher, picture, SOUND, FIRST, kept=0.0)
    video = upsampled(video)
    assert video.shape == (1, 128, 3, 4, 6)
    distilled, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 0.6, 0)
    return sampled(distilled, video, sound, SECOND, kept=0.2, seed=6)


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert [one.shape for one in found] == [one.shape for one in expected]
    for one, of_stock in zip(found, expected, strict=True):
        assert of_stock.std() > 0.1
        assert float((one - of_stock).abs().max() / of_stock.std()) <= TOLERANCE


@with_the_class
def test_two_stages_with_the_latent_upsampler(patchers: tuple[Any, Any]) -> None:
    """And a distilled LoRA, on every matrix of the blocks, of video, sound and both."""
    shapes = tiny_shapes("ltx2")
    layers = [
        (name.removesuffix(".weight"), (shape[0], shape[1]))
        for name, shape in shapes.items()
        if name.startswith("transformer_blocks") and name.endswith(".weight") and len(shape) == 2
    ]
    lora = factors(layers, scale=0.1)
    expected, found = (in_two_stages(patcher, lora) for patcher in patchers)
    assert_same(found, expected)
    plain = in_two_stages(patchers[1], {})
    assert relative_error(plain, found) > 0.01


@with_the_class
def test_cancelled_asleep_and_killed_in_mid_video(patchers: tuple[Any, Any]) -> None:
    """After each, video and sound are what they would have been."""
    import comfy.model_management

    stock, ours = patchers
    expected = sampled(stock, VIDEO, SOUND, FIRST)

    def cancel(*_: Any) -> None:
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(ours, VIDEO, SOUND, FIRST, callback=cancel)
    assert_same(sampled(ours, VIDEO, SOUND, FIRST), expected)
    ours.remote.sleep()
    assert sum(ours.remote.loaded_bytes()) == 0
    assert_same(sampled(ours, VIDEO, SOUND, FIRST), expected)

    def kill(*_: Any) -> None:
        (report,) = get_runtime().reports()
        os.kill(report.ranks[1]["pid"], signal.SIGKILL)

    with pytest.raises(GroupDiedError):
        sampled(ours, VIDEO, SOUND, FIRST, callback=kill)
    assert_same(sampled(ours, VIDEO, SOUND, FIRST), expected)


@pytest.mark.skipif(is_known("ltx2"), reason="this ComfyUI has the class")
def test_an_older_comfyui_says_which_release_knows_it(loading: ModuleType, tmp_path: Any) -> None:
    path = write_tiny("ltx2", tmp_path / "tiny.safetensors")
    group = GroupConfig(2, "cpu")
    with pytest.raises(CheckpointError, match=r"LTX-2 file .* Update ComfyUI: 0\.33 knows it"):
        loading.load_model(str(path), torch.float32, group, loading.Placement(), "auto")
