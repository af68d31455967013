"""The names under which LoRA files have a model's weights: of ours those that the stock MODEL has.

ComfyUI makes them of its model's weights (kohya's, diffusers', ai-toolkit's, SimpleTuner's, …): a
name that ours lacks would be a layer that a LoRA leaves as it is.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.compatibility import NEWER
from support.native import native_patcher
from support.newer import known
from support.pack import pack_module
from support.quantised_files import write_quantised
from support.tiny_models import write_fp8, write_tiny
from tp_runtime.client import GroupConfig

pytestmark = pytest.mark.comfy

# Families whose weights have names of their own with each kind of trainer.
STYLES = {
    "z_image": ("diffusion_model.layers.0.attention.qkv", "lycoris_layers_0_attention_to_q"),
    "flux": (
        "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer.transformer_blocks.0.attn.to_k",
    ),
    "qwen_image": (
        "transformer_blocks.0.attn.to_q",  # Lightning's
        "transformer.transformer_blocks.0.img_mlp.net.2",
        "lycoris_transformer_blocks_0_attn_to_q",
        "diffusion_model.transformer_blocks.0.img_mod.1",
    ),
    "wan": ("diffusion_model.blocks.0.self_attn.o", "lora_unet_blocks_0_ffn_2"),
    "minimax_h3": ("diffusion_model.blocks.0.attn.qkv_proj",),
    "ltx2": ("diffusion_model.transformer_blocks.0.audio_to_video_attn.to_out.0",),
}
# Of quantised weights, which no LoRA has.
COMPANIONS = (".comfy_quant", ".weight_scale", ".input_scale")


@pytest.fixture(scope="module")
def loading() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module


@pytest.mark.rotates(5)
@pytest.mark.parametrize("stored_as", ["plain", "fp8", "int8_convrot"])
@pytest.mark.parametrize("family", known())
def test_ours_has_every_name_of_the_stock_model(
    loading: ModuleType, tmp_path: Path, family: str, stored_as: str
) -> None:
    import comfy.lora

    path = write_tiny(family, tmp_path / "tiny.safetensors")
    stock: Any = native_patcher(path)
    if stored_as == "int8_convrot":  # ComfyUI 0.3.75 cannot load it
        path = write_quantised(path, tmp_path / "int8.safetensors", "int8_convrot")
        stock = native_patcher(path) if NEWER else stock
    elif stored_as == "fp8":
        path = write_fp8(path, tmp_path / "fp8.safetensors", "mixed")
        stock = native_patcher(path)
    ours = loading.load_model(
        str(path), torch.float32, GroupConfig(2, "cpu"), loading.Placement(), "auto"
    )
    expected, found = (comfy.lora.model_lora_keys_unet(one.model, {}) for one in (stock, ours))
    assert found == {name: key for name, key in expected.items() if not name.endswith(COMPANIONS)}
    assert set(STYLES.get(family, ())) <= found.keys()
