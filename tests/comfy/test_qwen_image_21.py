"""Our MODEL of Qwen-Image-2.1 in ComfyUI's sampler, beside the stock model of the same tiny file.

It needs a ComfyUI that has the model's class.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfy.conftest import largest_difference

from support.native import import_comfy, native_patcher
from support.newer import is_known
from support.pack import pack_module
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import GroupConfig, InputError, get_runtime

FAMILY = "qwen_image_21"
pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not is_known(FAMILY), reason="this ComfyUI has no class for it"),
]

TOLERANCE, BATCH_TOLERANCE = 1e-5, 1e-4
WIDTH = tiny(FAMILY).dim
LAYERS = {
    "transformer_blocks.0.attn.to_k": (WIDTH, WIDTH),
    "transformer_blocks.1.attn.to_out.0": (WIDTH, WIDTH),
    "transformer_blocks.1.img_mlp.out": (WIDTH, 3 * WIDTH),
    "modulation.1": (4 * WIDTH, WIDTH),
}
HALVES = {
    "transformer_blocks.0.img_mlp.gate_layer": (3 * WIDTH, WIDTH),
    "transformer_blocks.1.img_mlp.proj": (3 * WIDTH, WIDTH),
}
WHOLE = {"transformer_blocks.0.img_mlp.gate_up": (6 * WIDTH, WIDTH)}

Pair = tuple[Any, Any]


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module
    get_runtime().release()


@pytest.fixture(scope="module")
def pair(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The stock MODEL and ours on two ranks."""
    path: Path = write_tiny(FAMILY, tmp_path_factory.mktemp(FAMILY) / "tiny.safetensors")
    group, placement = GroupConfig(2, "cpu"), models.Placement()
    ours = models.load_model(str(path), torch.float32, group, placement, "auto")
    return native_patcher(path), ours


def sample(model: Any, pictures: int = 2, cfg: float = 1.0, channels: int = 64) -> torch.Tensor:
    """Two steps with the euler sampler; the pictures stand between the tokens of the text."""
    import_comfy()
    import comfy.sample

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    references = [random(1, 64, 4, 6), random(1, 64, 5, 3)][:pictures]
    more: dict[str, Any] = {"pooled_output": None}
    if references:
        more |= {"reference_latents": references, "image_slots": [3, 6][:pictures]}
    captions = [[[random(1, length, 64), dict(more)]] for length in (16, 12)]
    noise = random(1, channels, 6, 8)
    latent = torch.zeros_like(noise)
    found: torch.Tensor = comfy.sample.sample(
        model, noise, 2, cfg, "euler", "simple", *captions, latent, seed=7
    )
    return found


@pytest.mark.parametrize(("pictures", "cfg"), [(0, 1.0), (2, 1.0), (2, 4.0)])
def test_samples_are_the_stock_models(pair: Pair, pictures: int, cfg: float) -> None:
    stock, ours = pair
    expected = sample(stock, pictures, cfg)
    difference = largest_difference(sample(ours, pictures, cfg), expected)
    assert difference <= (TOLERANCE if cfg == 1 else BATCH_TOLERANCE)
    # ComfyUI switches its cache of text and pictures on and off around a run: ours takes both.
    assert ours.model.diffusion_model.current_patcher is None


@pytest.mark.parametrize("cache", [("auto", "default"), ("off", "default"), ("cpu", "int4")])
def test_comfyuis_cache_has_no_effect(pair: Pair, cache: tuple[str, str]) -> None:
    """What `QwenImage21Cache` sets, which all official templates have."""
    stock, ours = pair
    model = ours.clone()
    chosen = dict(zip(("device", "dtype"), cache, strict=True))
    model.model_options["transformer_options"]["qwen_image21_cache"] = chosen
    assert largest_difference(sample(model), sample(stock)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "up", "down", "layers"),
    [
        ("transformer.{}", "lora_B", "lora_A", LAYERS | HALVES),
        ("{}", "lora_B", "lora_A", LAYERS | HALVES),
        ("diffusion_model.{}", "lora_B", "lora_A", LAYERS | WHOLE),
        ("lora_unet_{}", "lora_up", "lora_down", LAYERS),
        ("lycoris_{}", "lora_up", "lora_down", LAYERS | HALVES),
    ],
    ids=["diffusers", "plain", "ai-toolkit", "kohya", "lycoris"],
)
def test_lora(
    pair: Pair, name: str, up: str, down: str, layers: dict[str, tuple[int, int]]
) -> None:
    """Under the names that each trainer gives its tensors, gate and up of the MLP apart."""
    import comfy.sd

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for path, (rows, columns) in layers.items():
        own = name.format(path.replace(".", "_") if name.startswith(("lora", "lyco")) else path)
        tensors[f"{own}.{up}.weight"] = torch.randn(rows, 4, generator=generator)
        factor = 0.1 * torch.randn(4, columns, generator=generator) / columns**0.5
        tensors[f"{own}.{down}.weight"] = factor
    stock, ours = (comfy.sd.load_lora_for_models(model, None, tensors, 0.9, 0)[0] for model in pair)
    assert len(ours.patches) == len(layers)
    found = sample(ours)
    assert largest_difference(found, sample(stock)) <= TOLERANCE
    assert largest_difference(found, sample(pair[1])) > 0.1


def test_latents_of_another_model(pair: Pair) -> None:
    with pytest.raises(InputError, match=r"\(batch, 64, height, width\); got \(1, 16, 6, 8\)"):
        sample(pair[1], channels=16)


@pytest.mark.parametrize("place", ["post_input", "single_block", "attn1_patch"])
def test_code_in_the_blocks_is_refused(pair: Pair, place: str) -> None:
    """So is its Fun ControlNet, a model patch."""
    model = pair[1].clone()
    code: Callable[[Any], Any] = lambda given: given  # noqa: E731
    model.set_model_patch(code, place)
    with pytest.raises(ValueError, match=rf"patches.{place}'\] is a Python function"):
        sample(model)
