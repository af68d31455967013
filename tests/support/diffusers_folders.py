"""Tiny diffusers folders, made from tiny ComfyUI files by diffusers' own names and orders.

Written out here, not derived from the pack's tables: those are what the tests check.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .tiny_models import tiny, write_tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """How to write a family's tiny file, its config.json and its tensors' diffusers names."""

    write: Callable[..., Path]
    config: dict[str, Any]
    rename: Callable[[str, torch.Tensor], Iterator[tuple[str, torch.Tensor]]]


def write_folder(file: Path, folder: Path, family: str, num_shards: int = 1) -> Path:
    """Write the tensors of a tiny default-size ComfyUI file as a diffusers folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(FAMILIES[family].config))
    tensors: Tensors = {}
    for name, tensor in load_file(file).items():
        for new_name, part in FAMILIES[family].rename(name, tensor):
            tensors[new_name] = part.contiguous()
    if num_shards == 1:
        save_file(tensors, folder / WEIGHTS)
        return folder
    shards: list[Tensors] = [{} for _ in range(num_shards)]
    for index, name in enumerate(sorted(tensors)):
        shards[index % num_shards][name] = tensors[name]
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"diffusion_pytorch_model-{index:05}-of-{num_shards:05}.safetensors"
        save_file(shard, folder / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _z_image(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if name == "norm_final.weight":
        return
    if name.endswith("attention.qkv.weight"):
        for which, part in zip("qkv", tensor.chunk(3), strict=True):
            yield name.replace("qkv", f"to_{which}"), part
        return
    name = name.replace("attention.out.", "attention.to_out.0.")
    name = re.sub(r"attention\.([qk])_norm", r"attention.norm_\1", name)
    yield re.sub(r"^(x_embedder|final_layer)\.", r"all_\1.2-1.", name), tensor


_FLUX_NAMES = {
    r"^img_in": "x_embedder",
    r"^txt_in": "context_embedder",
    r"^time_in": "time_text_embed.timestep_embedder",
    r"^guidance_in": "time_text_embed.guidance_embedder",
    r"^vector_in": "time_text_embed.text_embedder",
    r"in_layer": "linear_1",
    r"out_layer": "linear_2",
    r"^final_layer\.linear": "proj_out",
    r"^final_layer\.adaLN_modulation\.1": "norm_out.linear",
    r"^double_blocks": "transformer_blocks",
    r"^single_blocks": "single_transformer_blocks",
    r"img_mod\.lin": "norm1.linear",
    r"txt_mod\.lin": "norm1_context.linear",
    r"modulation\.lin\.": "norm.linear.",
    r"img_attn\.proj": "attn.to_out.0",
    r"txt_attn\.proj": "attn.to_add_out",
    r"img_attn\.norm\.query_norm\.scale": "attn.norm_q.weight",
    r"img_attn\.norm\.key_norm\.scale": "attn.norm_k.weight",
    r"txt_attn\.norm\.query_norm\.scale": "attn.norm_added_q.weight",
    r"txt_attn\.norm\.key_norm\.scale": "attn.norm_added_k.weight",
    r"norm\.query_norm\.scale": "attn.norm_q.weight",
    r"norm\.key_norm\.scale": "attn.norm_k.weight",
    r"img_mlp\.0": "ff.net.0.proj",
    r"img_mlp\.2": "ff.net.2",
    r"txt_mlp\.0": "ff_context.net.0.proj",
    r"txt_mlp\.2": "ff_context.net.2",
    r"linear2": "proj_out",
}


def _flux(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    is_double = name.startswith("double_blocks")
    for pattern, new in _FLUX_NAMES.items():
        name = re.sub(pattern, new, name)
    if name.startswith("norm_out."):
        shift, scale = tensor.chunk(2)
        yield name, torch.cat((scale, shift))
    elif is_double and ".qkv." in name:
        stream, names = (
            ("img_attn", ("to_q", "to_k", "to_v"))
            if "img_attn" in name
            else ("txt_attn", ("add_q_proj", "add_k_proj", "add_v_proj"))
        )
        for new, part in zip(names, tensor.chunk(3), strict=True):
            yield name.replace(f"{stream}.qkv", f"attn.{new}"), part
    elif ".linear1." in name:
        q, k, v, mlp = tensor.split([len(tensor) // 7] * 3 + [len(tensor) // 7 * 4])
        for new, part in (("attn.to_q", q), ("attn.to_k", k), ("attn.to_v", v), ("proj_mlp", mlp)):
            yield name.replace("linear1", new), part
    else:
        yield name, tensor


_FLUX2_NAMES = {
    r"^img_in": "x_embedder",
    r"^txt_in": "context_embedder",
    r"^time_in": "time_guidance_embed.timestep_embedder",
    r"^guidance_in": "time_guidance_embed.guidance_embedder",
    r"in_layer": "linear_1",
    r"out_layer": "linear_2",
    r"^final_layer\.linear": "proj_out",
    r"^final_layer\.adaLN_modulation\.1": "norm_out.linear",
    r"modulation(\w*)\.lin\.": r"modulation\1.linear.",
    r"^double_blocks": "transformer_blocks",
    r"^single_blocks": "single_transformer_blocks",
    r"img_attn\.proj": "attn.to_out.0",
    r"txt_attn\.proj": "attn.to_add_out",
    r"img_attn\.norm\.query_norm\.scale": "attn.norm_q.weight",
    r"img_attn\.norm\.key_norm\.scale": "attn.norm_k.weight",
    r"txt_attn\.norm\.query_norm\.scale": "attn.norm_added_q.weight",
    r"txt_attn\.norm\.key_norm\.scale": "attn.norm_added_k.weight",
    r"norm\.query_norm\.scale": "attn.norm_q.weight",
    r"norm\.key_norm\.scale": "attn.norm_k.weight",
    r"img_mlp\.0": "ff.linear_in",
    r"img_mlp\.2": "ff.linear_out",
    r"txt_mlp\.0": "ff_context.linear_in",
    r"txt_mlp\.2": "ff_context.linear_out",
    r"linear1": "attn.to_qkv_mlp_proj",
    r"linear2": "attn.to_out",
}
_STREAMS = {
    "img_attn": ("to_q", "to_k", "to_v"),
    "txt_attn": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def _flux2(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for pattern, new in _FLUX2_NAMES.items():
        name = re.sub(pattern, new, name)
    stream = next((one for one in _STREAMS if f"{one}.qkv." in name), None)
    if name.startswith("norm_out."):
        shift, scale = tensor.chunk(2)
        yield name, torch.cat((scale, shift))
    elif stream:
        for new, part in zip(_STREAMS[stream], tensor.chunk(3), strict=True):
            yield name.replace(f"{stream}.qkv", f"attn.{new}"), part
    else:
        yield name, tensor


def _as_they_are(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield name, tensor


_WAN_NAMES = {
    r"time_embedding\.0": "condition_embedder.time_embedder.linear_1",
    r"time_embedding\.2": "condition_embedder.time_embedder.linear_2",
    r"time_projection\.1": "condition_embedder.time_proj",
    r"text_embedding\.0": "condition_embedder.text_embedder.linear_1",
    r"text_embedding\.2": "condition_embedder.text_embedder.linear_2",
    r"img_emb\.emb_pos": "condition_embedder.image_embedder.pos_embed",
    r"img_emb\.proj\.0": "condition_embedder.image_embedder.norm1",
    r"img_emb\.proj\.1": "condition_embedder.image_embedder.ff.net.0.proj",
    r"img_emb\.proj\.3": "condition_embedder.image_embedder.ff.net.2",
    r"img_emb\.proj\.4": "condition_embedder.image_embedder.norm2",
    r"head\.head": "proj_out",
    r"head\.modulation": "scale_shift_table",
    r"modulation": "scale_shift_table",
    r"self_attn": "attn1",
    r"cross_attn": "attn2",
    r"norm_k_img": "norm_added_k",
    r"k_img": "add_k_proj",
    r"v_img": "add_v_proj",
    r"\.(q|k|v)\.": r".to_\1.",
    r"\.o\.": ".to_out.0.",
    r"ffn\.0": "ffn.net.0.proj",
    r"ffn\.2": "ffn.net.2",
    r"norm3": "norm2",
}


_LTX2_NAMES = {
    r"^(audio_)?patchify_proj": r"\1proj_in",
    r"^(audio_)?adaln_single": r"\1time_embed",
    r"^(audio_)?prompt_adaln_single": r"\1prompt_adaln",
    r"^av_ca_(video|audio)_scale_shift_adaln_single": r"av_cross_attn_\1_scale_shift",
    r"^av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    r"^av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    r"scale_shift_table_a2v_ca_(video|audio)": r"\1_a2v_cross_attn_scale_shift_table",
    r"\.([qk])_norm": r".norm_\1",
}


def _ltx2(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for pattern, new in _LTX2_NAMES.items():
        name = re.sub(pattern, new, name)
    yield name, tensor


def _wan(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for pattern, new in _WAN_NAMES.items():
        name = re.sub(pattern, new, name)
    yield name, tensor


_KREA2_NAMES = {
    r"^first": "img_in",
    r"^tmlp\.0": "time_embed.linear_1",
    r"^tmlp\.2": "time_embed.linear_2",
    r"^tproj\.1": "time_mod_proj",
    r"^txtmlp\.0\.scale": "txt_in.norm.weight",
    r"^txtmlp\.1": "txt_in.linear_1",
    r"^txtmlp\.3": "txt_in.linear_2",
    r"^txtfusion": "text_fusion",
    r"^blocks": "transformer_blocks",
    r"^last\.modulation\.lin": "final_layer.scale_shift_table",
    r"^last\.norm\.scale": "final_layer.norm.weight",
    r"^last": "final_layer",
    r"attn\.w([qkv])": r"attn.to_\1",
    r"attn\.wo": "attn.to_out.0",
    r"attn\.gate": "attn.to_gate",
    r"qknorm\.([qk])norm\.scale": r"norm_\1.weight",
    r"mlp": "ff",
    r"prenorm\.scale": "norm1.weight",
    r"postnorm\.scale": "norm2.weight",
    r"mod\.lin": "scale_shift_table",
}


def _krea2(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    flat = name.endswith("mod.lin")  # each block's six modulations; diffusers has them in rows
    for pattern, new in _KREA2_NAMES.items():
        name = re.sub(pattern, new, name)
    yield name, tensor.unflatten(0, (6, -1)) if flat else tensor


_Z, _F, _F2, _Q = tiny("z_image"), tiny("flux"), tiny("flux2"), tiny("qwen_image")
_Q21, _W, _K = tiny("qwen_image_21"), tiny("wan"), tiny("krea2")

# The connectors of its text are in a folder of their own.
FOLDER_LTX2 = {
    "connector_blocks": 0,
    "connector_heads": 30,
    "connector_head_dim": 128,
    "audio_connector_heads": 30,
    "audio_connector_head_dim": 128,
    "connector_gated": False,
}
_L = tiny("ltx2", **FOLDER_LTX2)

FAMILIES = {
    "z_image": Family(
        functools.partial(write_tiny, "z_image"),
        {
            "_class_name": "ZImageTransformer2DModel",
            "dim": _Z.dim,
            "n_heads": _Z.num_heads,
            "n_layers": _Z.num_layers,
            "n_refiner_layers": _Z.num_refiners,
            "cap_feat_dim": _Z.context_dim,
            "in_channels": _Z.in_channels,
        },
        _z_image,
    ),
    "flux": Family(
        functools.partial(write_tiny, "flux"),
        {
            "_class_name": "FluxTransformer2DModel",
            "attention_head_dim": _F.head_dim,
            "num_attention_heads": _F.num_heads,
            "num_layers": _F.num_doubles,
            "num_single_layers": _F.num_singles,
            "in_channels": 4 * _F.in_channels,
            "out_channels": None,
            "joint_attention_dim": _F.context_dim,
            "pooled_projection_dim": _F.vector_dim,
            "guidance_embeds": _F.guidance,
        },
        _flux,
    ),
    "flux2": Family(
        functools.partial(write_tiny, "flux2"),
        {
            "_class_name": "Flux2Transformer2DModel",
            "attention_head_dim": _F2.head_dim,
            "num_attention_heads": _F2.num_heads,
            "num_layers": _F2.num_doubles,
            "num_single_layers": _F2.num_singles,
            "in_channels": _F2.in_channels,
            "out_channels": None,
            "joint_attention_dim": _F2.context_dim,
        },
        _flux2,
    ),
    "qwen_image": Family(
        functools.partial(write_tiny, "qwen_image"),
        {
            "_class_name": "QwenImageTransformer2DModel",
            "attention_head_dim": _Q.head_dim,
            "num_attention_heads": _Q.num_heads,
            "num_layers": _Q.num_blocks,
            "in_channels": 64,
            "out_channels": 16,
            "joint_attention_dim": _Q.context_dim,
        },
        _as_they_are,
    ),
    "qwen_image_21": Family(
        functools.partial(write_tiny, "qwen_image_21", fused=False),
        {
            "_class_name": "QwenImage21Transformer2DModel",
            "attention_head_dim": _Q21.head_dim,
            "num_attention_heads": _Q21.num_heads,
            "num_layers": _Q21.num_blocks,
            "in_channels": _Q21.in_channels,
            "out_channels": None,
            "context_in_dim": _Q21.context_dim,
            "mlp_ratio": _Q21.mlp_ratio,
        },
        _as_they_are,
    ),
    "wan": Family(
        functools.partial(write_tiny, "wan"),
        {
            "_class_name": "WanTransformer3DModel",
            "attention_head_dim": _W.head_dim,
            "num_attention_heads": _W.num_heads,
            "num_layers": _W.num_blocks,
            "ffn_dim": _W.mlp_dim,
            "in_channels": _W.in_channels,
            "out_channels": _W.out_channels,
            "text_dim": _W.context_dim,
            "image_dim": _W.image_dim,
            "pos_embed_seq_len": _W.image_positions,
        },
        _wan,
    ),
    "ltx2": Family(
        functools.partial(write_tiny, "ltx2", **FOLDER_LTX2),
        {
            "_class_name": "LTX2VideoTransformer3DModel",
            "attention_head_dim": _L.head_dim,
            "num_attention_heads": _L.num_heads,
            "audio_attention_head_dim": _L.audio_head_dim,
            "audio_num_attention_heads": _L.audio_heads,
            "num_layers": _L.num_blocks,
            "in_channels": _L.in_channels,
            "audio_in_channels": _L.audio_channels,
            "caption_channels": _L.caption_channels,
            "cross_attn_mod": True,
            "gated_attn": True,
            "ff_bias": False,
            "use_prompt_embeddings": False,
            "use_keyframes_abs_pos_embedding": True,
            "rope_type": "split",
            "rope_double_precision": True,
            "causal_offset": 1,
            "pos_embed_max_pos": 20,
            "base_height": 2048,
            "base_width": 2048,
            "audio_pos_embed_max_pos": 20,
            "timestep_scale_multiplier": 1000,
            "cross_attn_timestep_scale_multiplier": 1000,
        },
        _ltx2,
    ),
    "krea2": Family(
        functools.partial(write_tiny, "krea2"),
        {
            "_class_name": "Krea2Transformer2DModel",
            "attention_head_dim": _K.head_dim,
            "num_attention_heads": _K.num_heads,
            "num_key_value_heads": _K.num_kv_heads,
            "num_layers": _K.num_blocks,
            "intermediate_size": _K.ffn_dim,
            "in_channels": 4 * _K.channels,
            "text_hidden_dim": _K.text_dim,
            "num_text_layers": _K.num_text_layers,
            "text_num_attention_heads": _K.num_text_heads,
            "text_num_key_value_heads": _K.num_text_kv_heads,
            "text_intermediate_size": _K.text_ffn_dim,
        },
        _krea2,
    ),
}
