"""Tiny files under the names that ComfyUI's official templates load.

What a published file is follows from its name: its family and variant (`MODELS`), its format, the
latents of an autoencoder (`VAES`). Models and LoRAs are real ones of few channels; text encoders,
autoencoders and vision models are those of `support.comfy_pack`.
"""

import json
import re
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from support.lora_files import factors, widening
from support.ltx2_inputs import OF_2_0, OF_2_3
from support.quantised_files import write_quantised
from support.tiny_controlnets import (
    write_flux_controlnet,
    write_qwen_image_controlnet,
    write_qwen_image_fun_controlnet,
)
from support.tiny_models import tiny, tiny_shapes, write_fp8, write_tiny
from support.workflows import Prompt

PICTURE = 96, 64
VIDEO_FRAMES = 9


@dataclass(frozen=True)
class Stands:
    """What a published model file is: a family's tiny model with these changes.

    `key`: a tensor, or setting=value of the metadata, that ComfyUI tells the variant by, where the
    family refuses it.
    """

    family: str
    changes: Mapping[str, Any]
    key: str = ""

    def write(self, path: Path, *, checkpoint: bool) -> None:
        """Write it, in the format that its name says, but for int8 below a folder `PLAIN`."""
        whole = write_tiny(self.family, path.with_suffix(".whole"), **self.changes)
        quantised = path.with_suffix(".quantised")
        if path.parent.name != PLAIN and is_int8(path.name):
            write_quantised(whole, quantised, "int8_convrot")
        elif "fp8mixed" in path.name:
            write_fp8(whole, quantised, "mixed")
        elif re.search("fp8_scaled|fp8_e4m3fn_scaled|scaled_e4m3fn", path.name):
            write_fp8(whole, quantised, "comfy_quant")
        elif "fp8" in path.name and not checkpoint:
            write_fp8(whole, quantised, "plain")
        else:
            whole.rename(quantised)
        if self.key or checkpoint:
            self._extend(quantised, checkpoint=checkpoint)
        quantised.rename(path)
        whole.unlink(missing_ok=True)

    def _extend(self, path: Path, *, checkpoint: bool) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        prefix = "model.diffusion_model." if checkpoint else ""
        tensors = {f"{prefix}{name}": value for name, value in load_file(path).items()}
        setting, _, value = self.key.partition("=")
        if value:
            metadata["config"] = json.dumps({"transformer": {setting: value}})
        elif self.key:
            tensors[f"{prefix}{self.key}"] = torch.zeros(1)
        if checkpoint:
            tensors |= {
                f"vae.{VAE_MARK}": _json_bytes(VAES_OF_CHECKPOINTS[self.family]),
                f"audio_vae.{VAE_MARK}": _json_bytes(LTX_SOUND),
            }
            metadata["tp_test_text_encoder"] = text_encoder(self)
        save_file(tensors, path, metadata=metadata)


def is_int8(name: str) -> bool:
    """Whether a file has weights in int8, whose products also round their inputs."""
    return re.search("int8[-_]convrot", name) is not None


PLAIN = "plain"  # folder of files whose weights are not in int8
VAE_MARK = "tp_test_vae"
IMAGE_TO_VIDEO = {"in_channels": 36, "image_dim": 1280}
SCAIL_2 = {"in_channels": 20, "pose_channels": 20, "mask_channels": 28}
# ComfyUI spreads the layers of Z-Image's ControlNets over 30 of the model's.
OF_30_LAYERS = {"num_heads": 6, "head_dim": 48, "ffn_dim": 768, "num_layers": 30, "time_dim": 288}
# Name of a published file → what it is; the first that is found in the name. Later ones follow.
MODELS: tuple[tuple[str, Stands], ...] = (
    (r"fasth3", Stands("minimax_h3", {}, "blocks.0.attn.to_gate_compress.weight")),
    (r"minimax_h3", Stands("minimax_h3", {})),
    (r"ltx-2\.5", Stands("ltx2", {})),
    (r"ltx-2\.3", Stands("ltx2", OF_2_3)),
    (r"ltx-2-19b", Stands("ltx2", OF_2_0)),
    (r"z_image.*int8", Stands("z_image", {})),  # rounding adds up over layers
    (r"z_image", Stands("z_image", OF_30_LAYERS)),
    (r"krea2", Stands("krea2", {})),
    (r"flux2_dev", Stands("flux2", {})),
    (r"flux-2-klein", Stands("flux2", {"guidance": False})),
    (r"flux1?.*fill", Stands("flux", {"in_channels": 96})),
    (r"flux1-canny", Stands("flux", {"in_channels": 32})),
    (r"flux1-schnell", Stands("flux", {"guidance": False})),
    (r"flux1-", Stands("flux", {})),
    (r"qwen_image_2\.1", Stands("qwen_image_21", {})),
    (r"qwen_image_layered", Stands("qwen_image", {"added_time": True})),
    (r"qwen_image_edit_2511", Stands("qwen_image", {"zero_time": True})),
    (r"qwen_image|FireRed-Image-Edit", Stands("qwen_image", {})),
    (r"s2v", Stands("wan", {}, "casual_audio_encoder.encoder.final_linear.weight")),
    (r"humo", Stands("wan", {}, "audio_proj.audio_proj_glob_1.layer.bias")),
    (r"SCAIL_2", Stands("wan", IMAGE_TO_VIDEO | SCAIL_2)),
    (r"dancer", Stands("wan", {}, "patch_embedding_global.weight")),
    (r"wan_animate_2", Stands("wan", IMAGE_TO_VIDEO | {"poses_pass": True})),
    (
        r"(?i)2[._]2[-_]animate",
        Stands("wan", IMAGE_TO_VIDEO | {"num_blocks": 5, "has_faces": True}),
    ),
    (r"causal_forcing", Stands("wan", {}, "causal_ar=True")),
    (r"ti2v_5B", Stands("wan", {"in_channels": 48, "out_channels": 48})),
    (
        r"fun_control_5B",
        Stands("wan", {"in_channels": 148, "out_channels": 48, "reference_channels": 48}),
    ),
    (r"fun_inpaint_5B", Stands("wan", {"in_channels": 100, "out_channels": 48})),
    (r"vace", Stands("wan", {"vace_blocks": 2, "vace_channels": 96})),
    (r"2\.2_fun_control", Stands("wan", {"in_channels": 52, "reference_channels": 16})),
    (r"2\.2_fun_camera", Stands("wan", {"in_channels": 36, "camera_channels": 24})),
    (
        r"fun_camera",
        Stands("wan", {"in_channels": 32, "image_dim": 1280, "camera_channels": 24}),
    ),
    (r"fun_control", Stands("wan", {"in_channels": 48, "image_dim": 1280})),
    (r"2\.2_(i2v|fun_inpaint)", Stands("wan", {"in_channels": 36})),
    (r"flf2v", Stands("wan", IMAGE_TO_VIDEO | {"image_positions": 514})),
    (r"wan2.*(t2v|bernini)", Stands("wan", {})),
    (r"(?i)wan2.*(i2v|fun_inp|WanMove)|chrono_edit", Stands("wan", IMAGE_TO_VIDEO)),
)
_VIDEO, _PICTURE = {"channels": 16, "downscale": 8, "frames": 4}, {"channels": 16, "downscale": 8}
LTX_VIDEO = {"channels": 128, "downscale": 32, "frames": 8}
LTX_SOUND = {"channels": 8, "bins": 16, "rate": 25, "bins_last": True}
VAES_OF_CHECKPOINTS = {"ltx2": LTX_VIDEO, "flux": _PICTURE}
# Name of a published autoencoder → arguments of `comfy_pack.vae.TinyVAE` or `TinyAudioVAE`.
VAES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (r"minimax_h3_video", {"channels": 24, "downscale": 16, "frames": 4}),
    (r"minimax_h3_audio", {"channels": 32, "bins": 2, "rate": 40, "bins_last": False}),
    (r"ltx-2\.5-audio", LTX_SOUND),
    (r"ltx-2\.5-video", LTX_VIDEO),
    (r"flux2|small_decoder", {"channels": 128, "downscale": 16}),
    (r"layered", _VIDEO | {"kept_apart": True, "colours": 4}),
    (r"qwen_image_vae", _VIDEO),
    (r"(?i)wan2\.2_vae", {"channels": 48, "downscale": 16, "frames": 4}),
    (r"(?i)wan", _VIDEO),
    (r"^ae\.", _PICTURE),
    (r"vae-ft-mse", {"channels": 4, "downscale": 8}),  # of depth models
)
_CLIP_VISION = {"sigclip": (729, 1152), "clip_vision_h": (257, 1280)}


def model_of(name: str) -> Stands | None:
    """What a model file is, by its name; None: no family of ours."""
    return _first(MODELS, name)


def text_encoder(model: Stands) -> str:
    """What a file of `comfy_pack.text_encoder` says, for the text encoder of a model."""
    sizes = tiny(model.family, **model.changes)
    if model.family == "ltx2":
        width = sizes.caption_channels if sizes.projects else sum(sizes.caption_dims)
        return f"{width},0,unprocessed"
    if model.family == "krea2":
        return f"{sizes.num_text_layers * sizes.text_dim}"
    if model.family == "flux":
        return f"{sizes.context_dim},{sizes.vector_dim}"
    return f"{sizes.context_dim}{',0,tags' if model.family == 'minimax_h3' else ''}"


def write_files_of(prompt: Prompt, models: Path, inputs: Path) -> None:
    """Write all that the loaders of a prompt load, if it is not there.

    Raises:
        KeyError: a file of which it is not known what it is.
    """
    of = next(filter(None, map(model_of, _names(prompt, "unet_name", "ckpt_name"))))
    for node in prompt.values():
        for name, (folder, write) in _LOADS.get(node["class_type"], {}).items():
            file = node["inputs"][name]
            path = (inputs if folder == "input" else models / folder) / file
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path, of)


def _names(prompt: Prompt, *inputs: str) -> list[str]:
    found = (node["inputs"].get(name) for node in prompt.values() for name in inputs)
    return [name for name in found if isinstance(name, str)]


def _write_model(path: Path, _: Stands) -> None:
    """One of another family, which stays with ComfyUI's loader, has one tensor."""
    if (model := model_of(path.name)) is None:
        save_file({"of_another_family.weight": torch.zeros(1)}, path)
    else:
        model.write(path, checkpoint=path.parent.name == "checkpoints")


def _write_text_encoder(path: Path, of: Stands) -> None:
    save_file(
        {"nothing": torch.zeros(1)}, path, metadata={"tp_test_text_encoder": text_encoder(of)}
    )


def _write_vae(path: Path, _: Stands) -> None:
    if (said := _first(VAES, path.name)) is None:
        raise KeyError(f"an autoencoder that has no tiny one: {path.name}")
    save_file({VAE_MARK: _json_bytes(said)}, path)


def _write_clip_vision(path: Path, _: Stands) -> None:
    patches, width = next(size for name, size in _CLIP_VISION.items() if name in path.name)
    said = {"patches": patches, "width": width}
    metadata = {"tp_test_clip_vision": json.dumps(said)}
    save_file({"nothing": torch.zeros(1)}, path, metadata=metadata)


def _write_lora(path: Path, of: Stands) -> None:
    """Of some linears of the first block, and of what widens the input (FLUX.1's Depth LoRA)."""
    shapes = tiny_shapes(of.family, **of.changes)
    layers = [
        (name.removesuffix(".weight"), (shape[0], shape[1]))
        for name, shape in sorted(shapes.items())
        if re.search(r"(blocks|layers)\.0\..*\.weight$", name) and len(shape) == 2
    ]
    tensors = factors(layers[::3], seed=len(path.name))
    if re.search("flux1-(depth|canny)-dev-lora", path.name):
        tensors |= widening("img_in", shapes["img_in.weight"])
    save_file(tensors, path)


def _write_controlnet(path: Path, of: Stands) -> None:
    if "Fun" in path.name:
        write_qwen_image_fun_controlnet(path)
    else:
        (write_flux_controlnet if of.family == "flux" else write_qwen_image_controlnet)(path)


def _write_picture(path: Path, _: Stands) -> None:
    _picture(len(path.name)).save(path, format="PNG")


def _picture(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (4, 6, 4), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy(), "RGBA").resize(PICTURE, Image.Resampling.BICUBIC)


def _write_sound(path: Path, _: Stands) -> None:
    """Two seconds of noise; what reads it looks at its content, not at its name."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(-9000, 9000, (32_000,), generator=generator, dtype=torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(samples.numpy().tobytes())


def _write_video(path: Path, _: Stands) -> None:
    """Moving colours, with a sound."""
    import av

    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = *PICTURE, "yuv420p"
        sound = file.add_stream("aac", rate=16_000)
        for index in range(VIDEO_FRAMES):
            picture = _picture(0).convert("RGB").rotate(index * 3)
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
        noise = torch.rand((1, 6_000), generator=torch.Generator().manual_seed(0)) - 0.5
        frame = av.AudioFrame.from_ndarray(noise.numpy(), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(sound.encode(frame))
        file.mux(sound.encode())


Write = Callable[[Path, Stands], None]
_TEXT = ("text_encoders", _write_text_encoder)
_OF_CHECKPOINTS = {"ckpt_name": ("checkpoints", _write_model)}
_OF_MODELS = {"unet_name": ("diffusion_models", _write_model)}
_LORA = {"lora_name": ("loras", _write_lora)}
# Node → its input that names a file → the folder that it is in, and what writes it.
_LOADS: Mapping[str, Mapping[str, tuple[str, Write]]] = {
    "UNETLoader": _OF_MODELS,
    "TPLoadDiffusionModel": _OF_MODELS,
    "CheckpointLoaderSimple": _OF_CHECKPOINTS,
    "TPLoadCheckpoint": _OF_CHECKPOINTS,
    "LTXVAudioVAELoader": _OF_CHECKPOINTS,
    "CLIPLoader": {"clip_name": _TEXT},
    "DualCLIPLoader": {"clip_name1": _TEXT, "clip_name2": _TEXT},
    "LTXAVTextEncoderLoader": {"text_encoder": _TEXT} | _OF_CHECKPOINTS,
    "VAELoader": {"vae_name": ("vae", _write_vae)},
    "LoraLoader": _LORA,
    "LoraLoaderModelOnly": _LORA,
    "LTXICLoRALoaderModelOnly": _LORA,
    "CLIPVisionLoader": {"clip_name": ("clip_vision", _write_clip_vision)},
    "ControlNetLoader": {"control_net_name": ("controlnet", _write_controlnet)},
    "LoadImage": {"image": ("input", _write_picture)},
    "LoadImageMask": {"image": ("input", _write_picture)},
    "LoadVideo": {"file": ("input", _write_video)},
    "LoadAudio": {"audio": ("input", _write_sound)},
}


def _first(table: tuple[tuple[str, Any], ...], name: str) -> Any:
    return next((found for pattern, found in table if re.search(pattern, name)), None)


def _json_bytes(said: Mapping[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
