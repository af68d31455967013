"""Models that ComfyUI knows and that cannot be split: refused by their names, never taken for ours.

Some have the tensors of a family that can be split, and others beside them.
"""

from pathlib import Path

import pytest
import torch

from support.compatibility import NEWER
from support.native import import_comfy
from support.sparse_files import holes, one_block, write_sparse
from support.tiny_models import tiny_shapes, write
from tp_runtime.client import CheckpointError, inspect_checkpoint
from tp_runtime.models import families
from tp_runtime.models.others import OTHERS

Shapes = dict[str, tuple[int, ...]]
_QWEN, _Z, _FLUX = (
    tiny_shapes(name, **one_block(name)) for name in ("qwen_image", "z_image", "flux")
)
_FLUX_NORM = {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}
_REFINED = {
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": (64,),
    "txt_in.input_embedder.weight": (64, 32),
    "final_layer.linear.weight": (16, 64),
}
_LUMINA = {
    "cap_embedder.1.weight": (2304, 64),
    "noise_refiner.0.attention.k_norm.weight": (16,),
    "layers.0.adaLN_modulation.1.weight": (64, 64),
}
_LTX = "adaln_single.emb.timestep_embedder.linear_1.bias"
_PREDICT = {"blocks.0.mlp.layer1.weight": (64, 64), "x_embedder.proj.1.weight": (2048, 68)}


def without(shapes: Shapes, *parts: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not any(p in name for p in parts)}


# What tells the files: label → tensors, and the `image_model` of ComfyUI (None: it has none).
FILES: dict[str, tuple[Shapes, str | None]] = {
    "Mage-Flow": (
        _QWEN | {"txt_norm.weight": (2560,), "proj_out.weight": (128, 384)},
        "mage_flow",
    ),
    "Z-Image in pixel space": (
        _Z
        | {
            "cap_embedder.1.weight": (3840, 64),
            "dec_net.cond_embed.weight": (64, 64),
            "dec_net.final_layer.linear.weight": (48, 64),
            "dec_net.input_embedder.embedder.0.weight": (64, 112),
        },
        "zimage_pixel",
    ),
    "Chroma Radiance": (
        without(_FLUX, "_mod.", "modulation", "vector_in", "img_in")
        | {
            "distilled_guidance_layer.in_proj.weight": (64, 64),
            "distilled_guidance_layer.norms.0.scale": (64,),
            "nerf_blocks.0.norm.scale": (64,),
            "nerf_image_embedder.embedder.0.weight": (64, 67),
            "img_in_patch.weight": (64, 3, 16, 16),
        },
        "chroma_radiance",
    ),
    "Chroma": (
        without(_FLUX, "_mod.", "modulation", "vector_in")
        | {
            "distilled_guidance_layer.in_proj.weight": (64, 64),
            "distilled_guidance_layer.norms.0.scale": (64,),
        },
        "chroma",
    ),
    "Ovis-Image": (
        without(_FLUX, "vector_in", "img_mlp")
        | {"double_blocks.0.img_mlp.gate_proj.weight": (64, 64)},
        "flux",
    ),
    "LongCat-Image": (without(_FLUX, "vector_in") | {"txt_in.weight": (384, 3584)}, "flux"),
    "HunyuanVideo 1.5": (
        _REFINED
        | {"img_in.proj.weight": (64, 65, 1, 1, 1), "vision_in.proj.0.weight": (32,)}
        | without(_FLUX, "img_in", "txt_in", "vector_in", "final_layer.linear"),
        "hunyuan_video",
    ),
    "HunyuanImage": (
        _REFINED | {"img_in.proj.weight": (64, 64, 1, 1)},
        "hunyuan_video",
    ),
    "HunyuanVideo": (
        _REFINED
        | {"img_in.proj.weight": (64, 16, 1, 2, 2)}
        | without(_FLUX, "img_in", "txt_in", "final_layer.linear"),
        "hunyuan_video",
    ),
    "JoyImage": (
        {
            "double_blocks.0.attn.img_attn_qkv.weight": (96, 32),
            "double_blocks.0.attn.img_attn_q_norm.weight": (16,),
            "condition_embedder.time_embedder.linear_1.weight": (32, 16),
            "img_in.weight": (32, 16, 1, 2, 2),
        },
        "joyimage",
    ),
    "NewBie": (_LUMINA | {"clip_text_pooled_proj.0.weight": (64,)}, "lumina2"),
    "Lumina 2": (without(_Z, "adaLN_modulation.0.") | _LUMINA, "lumina2"),
    "Lens": (
        without(_QWEN, "img_mlp", "add_q_proj")
        | {"transformer_blocks.0.img_mlp.w1.weight": (64, 64)},
        "lens",
    ),
    "LTX-Video": (
        {
            _LTX: (64,),
            "patchify_proj.weight": (64, 128),
            "transformer_blocks.0.attn2.to_k.weight": (64, 64),
        },
        "ltxv",
    ),
    "Stable Diffusion 3": ({"joint_blocks.0.context_block.attn.qkv.weight": (96, 32)}, None),
    "Stable Cascade": ({"clf.1.weight": (16, 16, 1, 1)}, None),
    "AuraFlow": ({"double_layers.0.attn.w1q.weight": (32, 32)}, None),
    "Hunyuan-DiT": (
        {
            "mlp_t5.0.weight": (64, 64),
            "x_embedder.proj.weight": (64, 4, 2, 2),
            "extra_embedder.0.weight": (64, 1024),
        },
        "hydit",
    ),
    "Mochi": ({"t5_yproj.weight": (64, 64)}, "mochi_preview"),
    "PixArt": ({"t_block.1.weight": (64, 64)}, "pixart_sigma"),
    "Cosmos": (
        {
            "blocks.block0.blocks.0.block.attn.to_q.0.weight": (4096, 64),
            "x_embedder.proj.1.weight": (64, 68),
        },
        "cosmos",
    ),
    "PiD": ({"lq_proj.latent_proj.0.weight": (64, 16, 3, 3)}, "pid"),
    "PixelDiT": ({"core.pixel_embedder.proj.weight": (16, 3)}, "pixeldit_t2i"),
    "CogVideoX": ({"blocks.0.norm1.linear.weight": (384, 64)}, "cogvideox"),
    "SeedVR2": (
        {
            "vid_in.proj.weight": (64, 132),
            "emb_in.proj_in.weight": (64, 256),
            "blocks.31.mlp.all.proj_in_gate.weight": (64, 64),
        },
        "seedvr2",
    ),
    "HiDream-O1": (
        {"x_embedder.proj1.weight": (64, 64), "t_embedder1.mlp.0.weight": (64, 64)},
        "hidream_o1",
    ),
    "HiDream": ({"caption_projection.0.linear.weight": (64, 64)}, "hidream"),
    "Anima": (
        _PREDICT | {"llm_adapter.blocks.0.cross_attn.q_proj.weight": (64, 64)},
        "anima",
    ),
    "Cosmos Predict2": (_PREDICT, "cosmos_predict2"),
    "Boogu-Image": (
        {
            "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight": (64, 64),
            "x_embedder.weight": (64, 64),
            "time_caption_embed.caption_embedder.0.weight": (64,),
            "time_caption_embed.timestep_embedder.linear_1.bias": (64,),
        },
        "boogu",
    ),
    "OmniGen2": ({"time_caption_embed.timestep_embedder.linear_1.bias": (64,)}, "omnigen2"),
    "Ideogram 4": (
        {"embed_image_indicator.weight": (2, 64), "input_proj.weight": (64, 128)},
        "ideogram4",
    ),
    "Kandinsky 5": (
        {
            "visual_transformer_blocks.0.cross_attention.key_norm.weight": (64,),
            "visual_transformer_blocks.0.feed_forward.in_layer.weight": (64, 64),
            "visual_embeddings.in_layer.bias": (1792,),
            "visual_embeddings.in_layer.weight": (64, 64),
            "time_embeddings.in_layer.bias": (64,),
        },
        "kandinsky5",
    ),
    "ERNIE-Image": ({"layers.0.mlp.linear_fc2.weight": (64, 64)}, "ernie"),
    "Stable Diffusion (UNet)": ({"input_blocks.0.0.weight": (16, 4, 3, 3)}, None),
}


def test_each_is_tested() -> None:
    assert FILES.keys() == {other.label for other in OTHERS}
    assert {other.like for other in OTHERS} <= {None, *families()}


@pytest.mark.parametrize("label", FILES)
def test_refused_by_its_name(tmp_path: Path, label: str) -> None:
    path = write_sparse(tmp_path / "other.safetensors", holes(FILES[label][0]))
    with pytest.raises(CheckpointError, match="cannot be split yet") as caught:
        inspect_checkpoint(str(path))
    assert f" {label} file (it" in str(caught.value)


@pytest.mark.skipif(not NEWER, reason="0.3.75 does not know all of them")
@pytest.mark.parametrize("label", [label for label, (_, model) in FILES.items() if model])
def test_comfyui_takes_these_files_for_the_same(label: str) -> None:
    import_comfy()
    from comfy.model_detection import detect_unet_config

    shapes, image_model = FILES[label]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert detect_unet_config(tensors, "")["image_model"] == image_model


VARIANTS = [(name, *of) for name, one in families().items() for of in one.variants.items()]


@pytest.mark.parametrize(
    ("name", "sign", "variant"), [x for x in VARIANTS if "." in x[1] or "=" in x[1]]
)
def test_a_variant_is_refused_by_its_name(
    tmp_path: Path, name: str, sign: str, variant: str
) -> None:
    """It has all tensors of its family, and one more, or a word in its metadata."""
    setting, _, value = sign.partition("=")
    shapes, told = tiny_shapes(name, **one_block(name)), {setting: value} if value else {}
    path = write(
        tmp_path / "variant.safetensors", shapes | ({} if value else {sign: (1,)}), told=told
    )
    with pytest.raises(CheckpointError, match="cannot be split yet") as caught:
        inspect_checkpoint(str(path))
    assert f" {variant} file (it" in str(caught.value)


@pytest.mark.parametrize("name", families())
def test_what_can_be_split_is_none_of_them(name: str) -> None:
    family = families()[name]
    for sizes in (family.published, family.small):
        shapes = sizes.table.file_tensors
        assert not [x.label for x in OTHERS if x.like == name and x.matches(shapes)]
