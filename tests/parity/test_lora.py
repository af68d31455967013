"""Patched weights on real ranks against ComfyUI's native model with the same patches."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity import test_flux, test_qwen_image, test_z_image
from parity.conftest import FP32_TOLERANCE, relative_error

from support.compatibility import NEWER
from support.inputs import make_inputs
from support.native import import_comfy, native_patcher
from support.newer import is_known
from support.pack import pack_module
from support.tiny_models import Fp8Layout, tiny, write_fp8, write_tiny
from tp_runtime.client import GroupConfig, ModelSpec, RemoteModel, Runtime, inspect_checkpoint
from tp_runtime.client.engine import Engine
from tp_runtime.wire.protocol import Request

pytestmark = pytest.mark.process

INPUTS: dict[str, dict[str, Any]] = {
    "z_image": test_z_image.make_inputs(1, 9, 8, 20),
    "flux": test_flux.make_inputs(references=((9, 8),)),
    "flux2": make_inputs(tiny("flux2"), references=((9, 8),)),
    "qwen_image": test_qwen_image.make_inputs(references=((9, 8),)),
    "wan": make_inputs(tiny("wan"), frames=2, height=5, width=6, time_scale=1000.0),
    "krea2": make_inputs(tiny("krea2"), references=((9, 8),), ref_latents_method="index"),
}
KNOWN = [family for family in INPUTS if is_known(family)]
# Family → one weight of every style: fused, column, row, gathered, replicated; a norm, a bias.
WEIGHTS = {
    "z_image": (
        *("layers.0.attention.qkv", "layers.0.attention.out", "layers.0.feed_forward.w1"),
        *("layers.1.feed_forward.w2", "layers.1.adaLN_modulation.0", "cap_embedder.1"),
        *("final_layer.linear", "noise_refiner.0.attention.qkv", "context_refiner.0.attention.out"),
    ),
    "flux": (
        *("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj", "img_in"),
        *("double_blocks.1.img_mlp.0", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1"),
        *("single_blocks.1.linear2", "single_blocks.0.modulation.lin", "final_layer.linear"),
    ),
    "flux2": (
        *("double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj", "img_in"),
        *("double_blocks.1.img_mlp.0", "double_blocks.1.txt_mlp.2", "single_blocks.0.linear1"),
        *("single_blocks.1.linear2", "single_stream_modulation.lin", "final_layer.linear"),
    ),
    "qwen_image": (
        *("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "txt_in", "img_in"),
        *("transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.add_k_proj"),
        *("transformer_blocks.1.img_mlp.net.0.proj", "transformer_blocks.1.txt_mlp.net.2"),
        *("transformer_blocks.0.img_mod.1", "proj_out"),
    ),
    "wan": (
        *(
            "blocks.0.self_attn.q",
            "blocks.0.self_attn.o",
            "blocks.0.cross_attn.k",
            "blocks.1.ffn.2",
        ),
        *("blocks.1.ffn.0", "time_projection.1", "blocks.1.cross_attn.o", "text_embedding.2"),
        *("head.head", "blocks.1.self_attn.v"),
    ),
    "krea2": (
        *("blocks.0.attn.wq", "blocks.0.attn.wk", "blocks.1.attn.gate", "blocks.0.attn.wo"),
        *("blocks.1.mlp.up", "blocks.1.mlp.down", "first", "tproj.1", "last.linear"),
        *("txtfusion.layerwise_blocks.0.attn.wv", "txtfusion.refiner_blocks.1.attn.wo", "tmlp.2"),
    ),
}
KINDS = ("lora", "dora", "loha", "lokr", "glora", "oft", "diff")

Patch = dict[Any, Any]


@pytest.fixture(scope="module")
def weights() -> Iterator[ModuleType]:
    with pack_module("nodes.weights") as module:
        yield module


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def change(kind: str, shape: tuple[int, ...], seed: int) -> Any:
    """A patch of that kind that changes a weight of that shape visibly."""
    import_comfy()
    import comfy.weight_adapter

    rows, columns = shape
    small = 0.3 / columns**0.5
    up, down = random(rows, 4, seed=seed), random(4, columns, seed=seed + 1) * small
    match kind:
        case "diff":
            return ("diff", (random(rows, columns, seed=seed) * small,))
        case "dora":
            kind, factors = "lora", (up, down, 2.0, None, 1 + up[:, :1].abs(), None)
        case "lora":
            factors = (up, down, 2.0, None, None, None)
        case "loha":
            other = random(rows, 4, seed=seed + 2), random(4, columns, seed=seed + 3)
            factors = (up, down, 4.0, *other, None, None, None)
        case "lokr":
            factors = (random(2, 2, seed=seed), down[:2, :4].repeat(rows // 4, columns // 8), 4.0)
            factors += (None,) * 6
        case "glora":
            factors = (random(columns, 4, seed=seed) * small, random(4, columns, seed=seed) * small)
            factors += (up, down, 2.0, None)
        case "oft":
            factors = (random(rows // 4, 4, 4, seed=seed) / 8, None, None, None)
    classes = {cls.name: cls for cls in comfy.weight_adapter.adapters}
    return classes[kind](set(), factors)


def convolution(shape: tuple[int, ...], seed: int) -> Any:
    """A LoRA of a convolution's weight."""
    import comfy.weight_adapter

    rows, *kernel = shape
    factors = random(rows, 4, *(len(kernel) - 1) * (1,), seed=seed), random(4, *kernel, seed=seed)
    return comfy.weight_adapter.LoRAAdapter(
        set(), (factors[0], 0.1 * factors[1], 2.0, *3 * (None,))
    )


def make_patches(patcher: Any, family: str, seed: int = 0) -> list[tuple[Patch, float]]:
    """Two sets of patches with their strengths: several kinds, parts of weights, norms, biases."""
    shapes = {k: tuple(v.shape) for k, v in patcher.model.state_dict().items()}
    first: Patch = {}
    second: Patch = {}
    for index, path in enumerate(WEIGHTS[family]):
        key = f"diffusion_model.{path}.weight"
        first[key] = change(KINDS[index % len(KINDS)], shapes[key], seed + index)
        rows, columns = shapes[key]
        part = (0, rows // 3, rows // 3)  # k of a fused q, k, v
        second[(key, part)] = change("lora", (rows // 3, columns), seed + 50 + index)
    own = {key: shape for key, shape in shapes.items() if key.startswith("diffusion_model.")}
    vectors = [key for key, shape in own.items() if len(shape) == 1][:40:4]
    biases = [f"diffusion_model.{path}.bias" for path in WEIGHTS[family]]
    for index, key in enumerate(sorted({*vectors, *biases} & own.keys())):
        first[key] = ("diff", (random(*shapes[key], seed=seed + index) * 0.1,))
    for key, shape in own.items():
        if len(shape) > 3:  # of a convolution
            first[key] = ("diff", (random(*shape, seed=seed) * 0.1,))
            second[key] = convolution(shape, seed)
    return [(first, 0.8), (second, -0.6)]


def apply(patcher: Any, remote: RemoteModel, weights: ModuleType, sets: list[Any]) -> None:
    """The same patches on both, instead of those of before."""
    patcher.detach()
    patcher.patches = {}
    for patches, strength in sets:
        added = patcher.add_patches(patches, strength)
        assert len(added) == len(patches)
    with torch.no_grad():
        patcher.load(torch.device("cpu"), full_load=True)
    remote.patch(object(), weights.patched_weights(remote.info, patcher.patches))


def native(patcher: Any, inputs: dict[str, Any]) -> torch.Tensor:
    named = inputs | {"transformer_options": {}}
    with torch.inference_mode():
        return patcher.model.diffusion_model(named.pop("x"), named.pop("timesteps"), **named)


def on_ranks(
    runtime: Runtime, path: Path, tp_size: int, weight_dtype: str = "float32"
) -> RemoteModel:
    spec = ModelSpec.of(str(path), weight_dtype, "float32")
    model = runtime.model(spec, GroupConfig(tp_size, "cpu"))
    model.ensure_loaded()
    return model


def digests(runtime: Runtime, model: RemoteModel) -> list[str]:
    """Of the model's weights, on every rank."""
    for report in runtime.reports(digests=True):
        if report.tp_size == model.group_config.tp_size:
            return [rank["models"][model.name]["digest"] for rank in report.ranks]
    raise AssertionError("no such group")


@pytest.mark.rotates(5)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", KNOWN)
def test_apply_change_remove(
    runtime: Runtime, weights: ModuleType, tmp_path: Path, family: str, tp_size: int
) -> None:
    """Every kind of patch on every style of layer; afterwards the file's weights, bit for bit."""
    inputs = INPUTS[family]
    path = write_tiny(family, tmp_path / "model.safetensors")
    patcher = native_patcher(path)
    if tp_size == 4 and family in ("flux", "flux2"):
        tp_size = 5  # which pads their 24 heads
    remote = on_ranks(runtime, path, tp_size)
    before = digests(runtime, remote)
    plain = remote.evaluate(inputs)
    sets = make_patches(patcher, family)

    for first_strength in (0.8, -0.3):
        apply(patcher, remote, weights, [(sets[0][0], first_strength), sets[1]])
        expected = native(patcher, inputs)
        assert relative_error(expected, plain) > 0.01
        assert relative_error(remote.evaluate(inputs), expected) <= FP32_TOLERANCE

    assert digests(runtime, remote) != before
    remote.patch(None, {})
    assert torch.equal(remote.evaluate(inputs), plain)
    assert digests(runtime, remote) == before


@pytest.mark.rotates(5)
@pytest.mark.parametrize("layout", ["plain", "scaled", "mixed"])
@pytest.mark.parametrize("family", ["flux", "wan"])
def test_fp8(
    runtime: Runtime, weights: ModuleType, tmp_path: Path, family: str, layout: Fp8Layout
) -> None:
    """Rounded to fp8 with ComfyUI's own random numbers, in each of its formats."""
    inputs = INPUTS[family]
    path = write_fp8(
        write_tiny(family, tmp_path / "whole.safetensors"), tmp_path / "fp8.safetensors", layout
    )
    plain_dtype = torch.float8_e4m3fn if layout == "plain" else None
    patcher = native_patcher(path, plain_dtype)
    remote = on_ranks(runtime, path, 2, "float8_e4m3fn" if plain_dtype else "float32")
    before = digests(runtime, remote)
    plain = remote.evaluate(inputs)
    sets = make_patches(patcher, family)
    if layout == "scaled" and not NEWER:  # it holds their biases in fp8; we as they are stored
        sets[0] = ({k: v for k, v in sets[0][0].items() if k.endswith(".weight")}, 0.8)
    apply(patcher, remote, weights, sets)
    expected = native(patcher, inputs)
    assert relative_error(expected, plain) > 0.01
    assert relative_error(remote.evaluate(inputs), expected) <= FP32_TOLERANCE
    remote.patch(None, {})
    remote.ensure_loaded()
    assert digests(runtime, remote) == before


def test_a_change_of_strength_reads_and_sends_nothing(
    runtime: Runtime, weights: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny("z_image", tmp_path / "model.safetensors")
    patcher = native_patcher(path)
    remote = on_ranks(runtime, path, 2)
    inputs = INPUTS["z_image"]
    first, _ = make_patches(patcher, "z_image")
    apply(patcher, remote, weights, [first])
    remote.evaluate(inputs)
    sent: list[str] = []
    send = Engine._send

    def spy(self: Engine, make: Callable[[int], Request], *args: Any, **kwargs: Any) -> Any:
        def made(number: int) -> Request:
            request = make(number)
            sent.append(type(request).__name__)
            return request

        return send(self, made, *args, **kwargs)

    monkeypatch.setattr(Engine, "_send", spy)
    path.unlink()  # the ranks must not read it
    apply(patcher, remote, weights, [(first[0], 0.1)])
    assert relative_error(remote.evaluate(inputs), native(patcher, inputs)) <= FP32_TOLERANCE
    assert sent == ["Patch", "Evaluate"]


def test_patches_of_two_models_on_one_group(
    runtime: Runtime, weights: ModuleType, tmp_path: Path
) -> None:
    """Factors that both use stay on the ranks for as long as one of them does."""
    found = []
    for seed in (1, 2):
        path = write_tiny("z_image", tmp_path / f"{seed}.safetensors", seed=seed)
        patcher, remote = native_patcher(path), on_ranks(runtime, path, 2)
        found.append((patcher, remote))
    inputs = INPUTS["z_image"]
    sets = make_patches(found[0][0], "z_image")
    for patcher, remote in found:
        apply(patcher, remote, weights, sets)
        assert relative_error(remote.evaluate(inputs), native(patcher, inputs)) <= FP32_TOLERANCE
    found[0][1].patch(None, {})
    found[0][1].evaluate(inputs)
    patcher, remote = found[1]
    apply(patcher, remote, weights, [(sets[0][0], 0.2)])
    assert relative_error(remote.evaluate(inputs), native(patcher, inputs)) <= FP32_TOLERANCE


def test_sleep_keeps_the_patches(runtime: Runtime, weights: ModuleType, tmp_path: Path) -> None:
    path = write_tiny("z_image", tmp_path / "model.safetensors")
    patcher, remote = native_patcher(path), on_ranks(runtime, path, 2)
    inputs = INPUTS["z_image"]
    apply(patcher, remote, weights, make_patches(patcher, "z_image"))
    expected = remote.evaluate(inputs)
    remote.sleep()
    assert remote.loaded_bytes() == [0, 0]
    path.unlink()
    assert torch.equal(remote.evaluate(inputs), expected)
    assert min(remote.loaded_bytes()) > 0


def test_what_is_no_lora_is_refused(weights: ModuleType, tmp_path: Path) -> None:
    path = write_tiny("z_image", tmp_path / "model.safetensors")
    info = inspect_checkpoint(str(path))
    key, shape = "diffusion_model.layers.0.attention.out.weight", (480, 480)
    whole = random(*shape, seed=1)
    up, down = random(480, 4, seed=1), random(4, 512, seed=2)
    wider = change("lora", shape, 0)
    wider.weights = (up, down, 1.0, None, None, [480, 512])
    cases = [
        ((0.5, [(whole, lambda a, **_: a)], 0.5, None, None), "ModelMerge"),
        ((0.5, ("model_as_lora", (whole,)), 1.0, None, None), "ModelMerge"),
        ((0.5, ("strange", (whole,)), 1.0, None, None), "'strange'"),
        ((0.5, (whole,), 1.0, None, lambda a: a), "the function"),
        ((0.5, wider, 1.0, None, None), r"larger \(\[480, 480\] to \[480, 512\]\)"),
        (
            (0.5, ("diff", (random(480, 512, seed=3), {"pad_weight": True})), 1.0, None, None),
            "larger",
        ),
    ]
    for patch, words in cases:
        with pytest.raises(ValueError, match=words):
            weights.patched_weights(info, {key: [patch]})


def test_a_patch_that_does_not_fit_is_left_out(
    weights: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny("z_image", tmp_path / "model.safetensors")
    key = "diffusion_model.layers.0.attention.out.weight"
    patch = (1.0, change("lora", (480, 96), 0), 1.0, None, None)
    assert weights.patched_weights(inspect_checkpoint(str(path)), {key: [patch]}) == {}
    assert "layers.0.attention.out.weight is left out" in caplog.text


def test_what_is_patched_is_what_comfyui_patches(
    runtime: Runtime, weights: ModuleType, tmp_path: Path
) -> None:
    """Parameters beside modules, other shapes of as many values, keys that are no weights."""
    path = write_tiny("z_image", tmp_path / "model.safetensors")
    patcher, remote = native_patcher(path), on_ranks(runtime, path, 2)
    out, prefix = "diffusion_model.layers.0.attention.out.weight", "diffusion_model."
    whole = random(480, 480, seed=3)
    sets = {
        f"{prefix}x_pad_token": (random(1, 480, seed=1),),
        f"{prefix}cap_pad_token": (random(1, 480, seed=2),),
        f"{prefix}norm_final.weight": (random(480, seed=4),),
        f"{prefix}layers.0.attention.q_norm.weight": (random(16, seed=5),),
        f"{prefix}layers.1.attention.out.weight": (whole.flatten(),),
        (f"{prefix}layers.0.attention.qkv.weight", (0, 480, 480)): (random(960, 240, seed=6),),
    }
    patcher.add_patches(sets, 0.5)
    patcher.add_patches({out: (whole.flatten(),)}, 0.5, 0.7)  # its strength of the weight counts
    model_sampling = next(key for key in patcher.model.state_dict() if prefix not in key)
    patcher.add_patches({model_sampling: (torch.ones(3),)}, 0.5)
    loaded = {
        f"{prefix}{name}" for name in weights.patched_by_module(patcher.model.diffusion_model)
    }
    own = {key: of for key, of in patcher.patches.items() if key in loaded}
    assert patcher.patches.keys() - own.keys() == {
        *(f"{prefix}{name}" for name in ("x_pad_token", "cap_pad_token")),
        model_sampling,
    }
    inputs = INPUTS["z_image"]
    unpatched = remote.evaluate(inputs)
    with torch.no_grad():
        patcher.load(torch.device("cpu"), full_load=True)
    remote.patch(object(), weights.patched_weights(remote.info, own))
    found = remote.evaluate(inputs)
    assert relative_error(found, unpatched) > 0.01
    assert relative_error(found, native(patcher, inputs)) <= FP32_TOLERANCE
    # Hooks reach what stands beside modules; what is no weight is left out there, too.
    every = weights.patched_weights(remote.info, patcher.patches)
    assert {"x_pad_token", "cap_pad_token"} == every.keys() - remote.patches.keys()
