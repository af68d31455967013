"""MiniMax H3 in ComfyUI's own samplers: our MODEL gives what the stock one does (ComfyUI 0.33).

Without nodes: they would need the text encoder and the autoencoders. What the nodes put into the
conditioning is made here, and `MiniMaxH3.extra_conds` makes the payload of it.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.accuracy import relative_error
from support.compatibility import NEWER
from support.lora_files import factors
from support.minimax_payloads import TAGS, keyframe, masks, picture, random, sound, video
from support.native import native_patcher
from support.pack import pack_module
from support.quantised_files import write_quantised
from support.tiny_models import tiny_shapes, write_tiny
from tp_runtime.client import CheckpointError, GroupConfig, get_runtime, inspect_checkpoint

pytestmark = pytest.mark.comfy

# Largest difference from the stock result, relative to its standard deviation.
TOLERANCE = 1e-5
of_newer = pytest.mark.skipif(not NEWER, reason="ComfyUI has MiniMax H3 since 0.33")

Sample = Callable[..., list[torch.Tensor]]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("minimax_h3", tmp_path_factory.mktemp("minimax_h3") / "h3.safetensors")


@pytest.fixture(scope="module")
def loading() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module
    get_runtime().release()


@pytest.fixture(scope="module")
def ours(loading: ModuleType, file: Path) -> Any:
    group, placement = GroupConfig(2, "cpu"), loading.Placement()
    return loading.load_model(str(file), torch.float32, group, placement, "auto")


@pytest.fixture(scope="module")
def stock(file: Path) -> Any:
    return native_patcher(file)


def sampled(
    patcher: Any,
    conditioning: Mapping[str, Any],
    *,
    masked: bool = False,
    cfg: float = 1.0,
    seed: int = 5,
    steps: int = 2,
) -> list[torch.Tensor]:
    """The latents of a video and of its sound, after a few steps of ComfyUI's KSampler."""
    import comfy.sample
    from comfy.nested_tensor import NestedTensor

    noise = NestedTensor((random(1, 1, 24, 3, 6, 8), random(2, 1, 32, 2, 5)))
    latent = NestedTensor((random(3, 1, 24, 3, 6, 8), random(4, 1, 32, 2, 5)))
    mask = NestedTensor(tuple(masks().values())) if masked else None
    positive = [[random(5, 1, 12, 64), dict(conditioning)]]
    negative = [[random(6, 1, 9, 64), dict(conditioning) | {"minimax_token_tags": None}]]
    found = comfy.sample.sample(
        patcher,
        noise,
        steps,
        cfg,
        "euler",
        "simple",
        positive,
        negative,
        latent,
        noise_mask=mask,
        seed=seed,
        disable_pbar=True,
    )
    return list(found.unbind())


def assert_like_stock(ours: Any, stock: Any, *args: Any, **kwargs: Any) -> None:
    expected = sampled(stock, *args, **kwargs)
    found = sampled(ours, *args, **kwargs)
    assert [one.shape for one in found] == [(1, 24, 3, 6, 8), (1, 32, 2, 5)]
    for one, of_stock in zip(found, expected, strict=True):
        assert float((one - of_stock).abs().max() / of_stock.std()) <= TOLERANCE


KEYFRAMES = {"minimax_keyframes": [keyframe(0, 1), keyframe(8, 2, samples=2)]}
REFERENCES = {
    "minimax_refs": [picture(4, 6, 3), video(2, 4, 4), sound(3, 5)],
    "minimax_token_tags": TAGS,
}


@of_newer
@pytest.mark.parametrize(
    ("conditioning", "options"),
    [
        ({}, {"seed": 2**64 - 2}),
        ({}, {"cfg": 3.0}),
        (KEYFRAMES, {"masked": True}),
        (REFERENCES, {"steps": 3}),
    ],
    ids=["text", "two prompts", "keyframes and masks", "references"],
)
def test_sampling(
    ours: Any, stock: Any, conditioning: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    assert_like_stock(ours, stock, conditioning, **options)


@of_newer
def test_shifts(ours: Any, stock: Any) -> None:
    """'ModelSamplingMiniMaxH3': of the schedule, and numbers that the model reads."""
    from comfy.model_sampling import CONST, ModelSamplingAV

    class Shifted(ModelSamplingAV, CONST):
        pass

    def with_shifts(patcher: Any) -> Any:  # as the node does, which imports ComfyUI's `nodes`
        clone = patcher.clone()
        sampling = Shifted(clone.model.model_config)
        sampling.set_parameters(shift=5.0, audio_shift=2.0)
        clone.add_object_patch("model_sampling", sampling)
        options = clone.model_options.setdefault("transformer_options", {})
        options |= {
            "minimax_h3_sigma_shift_video": 5.0,
            "minimax_h3_sigma_shift_audio": 2.0,
        }
        return clone

    shifted = [with_shifts(one) for one in (ours, stock)]
    assert_like_stock(*shifted, {})
    usual, other = (sampled(one, {}) for one in (ours, shifted[0]))
    assert not torch.allclose(usual[1], other[1], rtol=1e-2)


@of_newer
def test_wrappers_see_the_sound_as_the_model_does(ours: Any, stock: Any) -> None:
    """ComfyUI's class scales it outside of them."""
    from comfy.patcher_extension import WrappersMP

    seen: list[list[torch.Tensor]] = []

    def wrapper(executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        found = executor(x, *args, **kwargs)
        seen.append([x[1].clone(), found[1].clone()])
        return found

    for patcher in (ours, stock):
        clone = patcher.clone()
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
        sampled(clone, {})
    half = len(seen) // 2
    assert half == 2
    for found, expected in zip(seen[:half], seen[half:], strict=True):
        for one, of_stock in zip(found, expected, strict=True):
            assert float((one - of_stock).abs().max() / of_stock.std()) <= TOLERANCE


@of_newer
@pytest.mark.parametrize(
    ("payload", "where"),
    [
        ({"seed": object()}, "minimax_payload.seed"),
        ({"keyframes": [{"resolved_frame_index": print}]}, "keyframes.0.resolved_frame_index"),
    ],
    ids=["a number", "in a list"],
)
def test_what_is_no_plain_data_is_refused_by_name(
    ours: Any, payload: Mapping[str, Any], where: str
) -> None:
    latents = [random(1, 1, 24, 3, 6, 8), random(2, 1, 32, 2, 5)]
    inputs = latents, torch.tensor([500.0]), random(5, 1, 12, 64)
    with pytest.raises(ValueError, match=where):
        ours.model.diffusion_model(*inputs, minimax_payload=payload)


@of_newer
def test_steps_are_recorded_by_the_videos_size(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler has video and sound in one row, of which `auto` could tell nothing."""
    workloads: list[Any] = []
    monkeypatch.setattr(
        type(ours.remote), "_record_step", lambda _, workload, _ms: workloads.append(workload)
    )
    sampled(ours, {})
    assert {one.latent_shape for one in workloads} == {(1, 24, 3, 6, 8)}


@pytest.mark.skipif(NEWER, reason="this ComfyUI knows MiniMax H3")
def test_an_older_comfyui_is_told_which_knows_it(file: Path) -> None:
    with (
        pack_module("nodes.skeleton") as skeleton,
        pytest.raises(CheckpointError, match=r"MiniMax H3 file .* Update ComfyUI: 0\.33 knows it"),
    ):
        skeleton.build_skeleton(inspect_checkpoint(str(file)), None)


@of_newer
@pytest.mark.parametrize("name", ["int8_convrot", "fp8"])
def test_quantised_files(
    loading: ModuleType, ours: Any, file: Path, tmp_path: Path, name: str
) -> None:
    """As near to what ComfyUI makes of the file as that is to the plain one; on ranks, heads are
    cut where the format's groups are not, so some layers are held dequantised.
    """
    path = write_quantised(file, tmp_path / "quantised.safetensors", name)
    group, placement = GroupConfig(2, "cpu"), loading.Placement()
    quantised = loading.load_model(str(path), torch.float32, group, placement, "auto")
    found, comfy, plain = (
        sampled(one, KEYFRAMES, steps=1) for one in (quantised, native_patcher(path), ours)
    )
    for one, of_comfy, of_plain in zip(found, comfy, plain, strict=True):
        assert relative_error(one, of_comfy) <= relative_error(of_comfy, of_plain) > 1e-4


LAYERS = ("attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2", "adaln_proj.linear")


@of_newer
def test_lora(ours: Any, stock: Any) -> None:
    """On every kind of layer, those in fp32 included; q, k and v in one, as 'Turbo' LoRAs are."""
    import comfy.sd

    shapes = tiny_shapes("minimax_h3")
    paths = [f"blocks.{index}.{layer}" for index in (0, 1) for layer in LAYERS]
    paths += ["token_refiner.blocks.0.attn.qkv_proj", "condition_proj", "video_patch_proj"]
    lora = factors([(path, shapes[f"{path}.weight"]) for path in paths])
    patched = [comfy.sd.load_lora_for_models(one, None, lora, 0.8, 0)[0] for one in (ours, stock)]
    assert_like_stock(*patched, KEYFRAMES, steps=1)
    for one, other in zip(sampled(ours, {}), sampled(patched[0], {}), strict=True):
        assert relative_error(one, other) > 1e-3
