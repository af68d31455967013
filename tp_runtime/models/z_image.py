"""Z-Image (turbo and base): a single-stream transformer over caption and image tokens.

The module tree is diffusers' ``ZImageTransformer2DModel``
(diffusers 0.42, models/transformers/transformer_z_image.py); the arithmetic of ``Driver`` follows
ComfyUI's ``NextDiT._forward`` (ComfyUI 0.3.75, comfy/ldm/lumina/model.py), whose results it
reproduces.

Shapes: B batch, C latent channels, H W latent size (padded to even), L tokens, D model width,
N heads on this rank, K head width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, InputError
from ..files.safetensors_file import TensorInfo
from ..gpu.graphs import fused
from ..sharding.block_costs import Stage
from ..sharding.parts import Source, Sources
from ..sharding.plan import QKV, Column, MergedColumn, Plan, Replicated, Row, Split
from .layers import (
    Conditioning,
    DriverBase,
    Product,
    attention,
    check_context,
    count_blocks,
    rms_norm,
    rope_rotation,
    rotated_heads,
    silu_gate,
    timestep_embedding,
)

FAMILY = "z_image"
LABEL = "Z-Image"
UNUSED = frozenset({"norm_final.weight"})  # in the file, used by no implementation
DIFFUSERS_CLASS = "ZImageTransformer2DModel"
SWAPPED_HALVES: frozenset[str] = frozenset()

ADALN_DIM = 256
NORM_EPS = 1e-5
ROPE_THETA = 256.0
TIME_SCALE = 1000.0
PATCH = 2
TOKEN_MULTIPLE = 32
_EMBEDDER = f"{PATCH}-1"


# --- the file ----------------------------------------------------------------------------------


def recognises(tensors: Mapping[str, TensorInfo]) -> bool:
    """Lumina 2 has the same names but for the modulation, which there follows a SiLU (index 1)."""
    return "cap_embedder.1.weight" in tensors and "layers.0.adaLN_modulation.0.weight" in tensors


def infer_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The sizes of the model, from its tensors' shapes. Raises KeyError for a missing tensor."""
    dim, cap_feat_dim = tensors["cap_embedder.1.weight"].shape
    head_dim = tensors["layers.0.attention.q_norm.weight"].shape[0]
    if head_dim % 16 or dim % head_dim:
        raise CheckpointError(
            f"A Z-Image file of width {dim} with heads of {head_dim}: heads must be a multiple of "
            "16 and divide the width. The file is damaged or of another architecture."
        )
    return {
        "dim": dim,
        "n_heads": dim // head_dim,
        "head_dim": head_dim,
        "ffn_dim": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "n_layers": count_blocks(tensors, "layers"),
        "n_refiner_layers": count_blocks(tensors, "noise_refiner"),
        "cap_feat_dim": cap_feat_dim,
        "in_channels": tensors["x_embedder.weight"].shape[1] // PATCH**2,
        "time_embed_dim": tensors["t_embedder.mlp.0.weight"].shape[0],
        "axes_dims": (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3),
        "rope_theta": ROPE_THETA,
        "time_scale": TIME_SCALE,
        "pad_tokens_multiple": TOKEN_MULTIPLE if "cap_pad_token" in tensors else None,
    }


def file_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the ComfyUI file."""
    dim, head_dim, ffn = config["dim"], config["head_dim"], config["ffn_dim"]
    adaln = min(dim, ADALN_DIM)
    patch = PATCH**2 * config["in_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.weight": (dim, patch),
        "x_embedder.bias": (dim,),
        "cap_embedder.0.weight": (config["cap_feat_dim"],),
        "cap_embedder.1.weight": (dim, config["cap_feat_dim"]),
        "cap_embedder.1.bias": (dim,),
        "t_embedder.mlp.0.weight": (config["time_embed_dim"], 256),
        "t_embedder.mlp.0.bias": (config["time_embed_dim"],),
        "t_embedder.mlp.2.weight": (adaln, config["time_embed_dim"]),
        "t_embedder.mlp.2.bias": (adaln,),
        "final_layer.linear.weight": (patch, dim),
        "final_layer.linear.bias": (patch,),
        "final_layer.adaLN_modulation.1.weight": (dim, adaln),
        "final_layer.adaLN_modulation.1.bias": (dim,),
    }
    if config["pad_tokens_multiple"]:
        shapes |= {"x_pad_token": (1, dim), "cap_pad_token": (1, dim)}
    for path, modulated in _blocks(config):
        shapes |= {
            f"{path}.attention.qkv.weight": (3 * dim, dim),
            f"{path}.attention.out.weight": (dim, dim),
            f"{path}.attention.q_norm.weight": (head_dim,),
            f"{path}.attention.k_norm.weight": (head_dim,),
            f"{path}.feed_forward.w1.weight": (ffn, dim),
            f"{path}.feed_forward.w2.weight": (dim, ffn),
            f"{path}.feed_forward.w3.weight": (ffn, dim),
            f"{path}.attention_norm1.weight": (dim,),
            f"{path}.attention_norm2.weight": (dim,),
            f"{path}.ffn_norm1.weight": (dim,),
            f"{path}.ffn_norm2.weight": (dim,),
        }
        if modulated:
            shapes[f"{path}.adaLN_modulation.0.weight"] = (4 * dim, adaln)
            shapes[f"{path}.adaLN_modulation.0.bias"] = (4 * dim,)
    return shapes


def _blocks(config: dict[str, Any]) -> list[tuple[str, bool]]:
    refiners = range(config["n_refiner_layers"])
    return (
        [(f"noise_refiner.{i}", True) for i in refiners]
        + [(f"context_refiner.{i}", False) for i in refiners]
        + [(f"layers.{i}", True) for i in range(config["n_layers"])]
    )


_FILE_NAMES = {
    f"all_x_embedder.{_EMBEDDER}.": "x_embedder.",
    f"all_final_layer.{_EMBEDDER}.": "final_layer.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_q.": ".attention.q_norm.",
    ".attention.norm_k.": ".attention.k_norm.",
}


def sources(config: dict[str, Any]) -> Sources:
    """Where the file keeps a parameter of the diffusers module."""
    shapes, dim = file_tensors(config), config["dim"]

    def find(parameter: str) -> tuple[Source, ...]:
        for index, projection in enumerate(("to_q", "to_k", "to_v")):
            if parameter.endswith(f".attention.{projection}.weight"):
                name = parameter.replace(projection, "qkv")
                return (Source(name, index * dim, (index + 1) * dim),)
        name = parameter
        for ours, theirs in _FILE_NAMES.items():
            name = name.replace(ours, theirs)
        return (Source(name, 0, shapes[name][0]),)

    return find


def diffusers_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a diffusers folder's config.json gives. Raises KeyError for one it lacks."""
    dim = settings["dim"]
    return {
        "dim": dim,
        "head_dim": dim // settings["n_heads"],
        "ffn_dim": int(dim / 3 * 8),
        "n_layers": settings["n_layers"],
        "n_refiner_layers": settings["n_refiner_layers"],
        "cap_feat_dim": settings["cap_feat_dim"],
        "in_channels": settings["in_channels"],
        "time_embed_dim": min(dim, 1024),
        "pad_tokens_multiple": TOKEN_MULTIPLE,
    }


def latent_shape(config: dict[str, Any], width: int, height: int) -> tuple[int, ...]:
    """Shape of one latent for a picture of ``width`` x ``height`` pixels."""
    return config["in_channels"], height // 8, width // 8


# --- the model ---------------------------------------------------------------------------------


def plan(config: dict[str, Any]) -> Plan:
    """Everything with weight is split; what is left is the first and last projection."""
    heads = Split(config["n_heads"], config["head_dim"])
    return Plan(
        {
            "*.*.attention.{to_q,to_k,to_v}": QKV(
                "to_qkv", config["head_dim"], config["n_heads"], config["n_heads"]
            ),
            "*.*.attention.to_out.0": Row((heads,)),
            "*.*.feed_forward.{w1,w3}": MergedColumn("w13"),
            "*.*.feed_forward.w2": Row(),
            "*.*.adaLN_modulation.0": Column(),  # gathered by the driver, all at once
            "all_final_layer.*.adaLN_modulation.1": Column(gather=True),
            "cap_embedder.1": Column(gather=True),
            "all_x_embedder.*": Replicated(),
            "all_final_layer.*.linear": Replicated(),
            "t_embedder.mlp.0": Column(),
            "t_embedder.mlp.2": Row(),
        }
    )


def stages(config: dict[str, Any], image_tokens: int, text_tokens: int) -> list[Stage]:
    """The blocks of one evaluation; the caption's own run once per generation."""
    multiple = config["pad_tokens_multiple"] or 1
    image, text = (-(-tokens // multiple) * multiple for tokens in (image_tokens, text_tokens))
    dim, heads = config["dim"], Split(config["n_heads"], config["head_dim"])
    modulation = min(dim, ADALN_DIM), 4 * dim
    return [
        Stage(count, (tokens,), dim, heads, Split(config["ffn_dim"]), modulation, gated=True)
        for count, tokens in (
            (config["n_refiner_layers"], image),
            (config["n_layers"], text + image),
        )
    ]


def build(config: dict[str, Any]) -> nn.Module:
    """The diffusers module with the file's sizes. Call it under ``torch.device("meta")``."""
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        all_patch_size=(PATCH,),
        all_f_patch_size=(1,),
        in_channels=config["in_channels"],
        dim=config["dim"],
        n_layers=config["n_layers"],
        n_refiner_layers=config["n_refiner_layers"],
        n_heads=config["n_heads"],
        n_kv_heads=config["n_heads"],
        norm_eps=NORM_EPS,
        cap_feat_dim=config["cap_feat_dim"],
        rope_theta=config["rope_theta"],
        t_scale=config["time_scale"],
        axes_dims=list(config["axes_dims"]),
    )
    # diffusers derives these two from dim; the file decides.
    adaln, hidden = min(config["dim"], ADALN_DIM), config["time_embed_dim"]
    model.t_embedder.mlp[0] = nn.Linear(256, hidden)
    model.t_embedder.mlp[2] = nn.Linear(hidden, adaln)
    for path, _ in _blocks(config):
        feed_forward = model.get_submodule(path).feed_forward
        for name in ("w1", "w3"):
            setattr(feed_forward, name, nn.Linear(config["dim"], config["ffn_dim"], bias=False))
        feed_forward.w2 = nn.Linear(config["ffn_dim"], config["dim"], bias=False)
    if not config["pad_tokens_multiple"]:
        del model.x_pad_token, model.cap_pad_token
    return model


@fused
def _norm_modulate(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """RMS norm of (B, L, D), then scaled by (B, D)."""
    return rms_norm(x, weight, NORM_EPS) * (1 + scale[:, None])


class Driver(DriverBase):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    label = LABEL

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        num_tokens: int | None = None,  # noqa: ARG002  (ComfyUI passes it, the model has no use)
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``caption`` (B, L, D): refined caption ``context`` (B, L, cap_feat_dim), padded.

        ``rotation`` (1, L+L', 1, K/2, 2): of the caption's and then the image's tokens.
        """
        self._check(x, context)
        if (transformer_options or {}).get("skip_blocks"):
            raise InputError(
                f"{LABEL} on the process group cannot leave blocks out (skip-layer guidance). "
                "Remove or bypass that node, or load the model with the stock 'Load Diffusion "
                "Model' node."
            )
        norm, embed = self.model.cap_embedder
        caption = embed(rms_norm(context, norm.weight, NORM_EPS))
        caption = self._pad_tokens(caption, "cap_pad_token")
        length = caption.shape[1]
        rope_options = (transformer_options or {}).get("rope_options") or {}
        rotation = self._rotation(length, x.shape[-2:], rope_options, x.device)
        for block in self.model.context_refiner:
            caption = self._caption_block(block, caption, rotation[:, :length])
        return {"caption": caption, "rotation": rotation}

    def step(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        caption: torch.Tensor,
        rotation: torch.Tensor,
    ) -> torch.Tensor:
        """(B, C, H, W) → the same."""
        height, width = x.shape[-2:]
        x = F.pad(x, (0, width % PATCH, 0, height % PATCH), mode="circular")
        time = timestep_embedding((1.0 - timesteps) * TIME_SCALE, 256).to(x.dtype)
        adaln = self.model.t_embedder.mlp(time)
        image = self._image_tokens(x)
        refiner, layers = self.model.noise_refiner, self.model.layers
        modulation = self._modulation([*refiner, *layers], adaln)
        length = caption.shape[1]
        image = self._run_blocks(refiner, image, rotation[:, length:], modulation[: len(refiner)])
        tokens = torch.cat((caption, image), dim=1)
        tokens = self._run_blocks(layers, tokens, rotation, modulation[len(refiner) :])
        return -self._unpatchify(tokens[:, length:], adaln, x.shape)[:, :, :height, :width]

    def _check(self, x: torch.Tensor, context: torch.Tensor) -> None:
        channels, width = self.config["in_channels"], self.config["cap_feat_dim"]
        if x.ndim != 4 or x.shape[1] != channels:
            raise InputError(
                f"{LABEL} works on latents of shape (batch, {channels}, height, width); got "
                f"{tuple(x.shape)}. Use an empty latent node for 16-channel latents."
            )
        check_context(context, x.shape[0], width, LABEL)

    def _pad_tokens(self, tokens: torch.Tensor, pad_token: str) -> torch.Tensor:
        multiple = self.config["pad_tokens_multiple"]
        missing = -tokens.shape[1] % multiple if multiple else 0
        if not missing:
            return tokens
        pad = getattr(self.model, pad_token).expand(tokens.shape[0], missing, -1)
        return torch.cat((tokens, pad), dim=1)

    def _rotation(
        self,
        caption_length: int,
        size: torch.Size,
        options: Mapping[str, float],
        device: torch.device,
    ) -> torch.Tensor:
        """Positions: the caption counts along the first axis, the image lies at its end."""
        rows, columns = -(-size[0] // PATCH), -(-size[1] // PATCH)
        multiple = self.config["pad_tokens_multiple"] or 1
        num_image = -(-rows * columns // multiple) * multiple
        positions = torch.zeros(caption_length + num_image, 3, dtype=torch.float32, device=device)
        along = torch.arange(max(caption_length, rows, columns), dtype=torch.float32, device=device)
        positions[:caption_length, 0] = along[:caption_length] + 1.0
        image = positions[caption_length : caption_length + rows * columns]
        image[:, 0] = caption_length + 1
        y = along[:rows] * options.get("scale_y", 1.0) + options.get("shift_y", 0.0)
        x = along[:columns] * options.get("scale_x", 1.0) + options.get("shift_x", 0.0)
        image[:, 1] = y.repeat_interleave(columns)
        image[:, 2] = x.repeat(rows)
        return rope_rotation(positions, self.config["axes_dims"], self.config["rope_theta"])

    def _image_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) → (B, L, D), padded to the token multiple."""
        patches = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self._pad_tokens(self.model.all_x_embedder[_EMBEDDER](patches), "x_pad_token")

    def _modulation(self, blocks: Sequence[Any], adaln: torch.Tensor) -> torch.Tensor:
        """Scale and gate of attention and MLP, (blocks, 1, B, 4, D), with one gather for all."""
        local = torch.stack([block.adaLN_modulation[0](adaln) for block in blocks])
        full = self.gather(local)[..., : 4 * self.config["dim"]]
        return full.unflatten(-1, (4, -1)).unsqueeze(1)

    def _run_blocks(
        self,
        blocks: Sequence[Any],
        tokens: torch.Tensor,
        rotation: torch.Tensor,
        modulation: torch.Tensor,
    ) -> torch.Tensor:
        """Transformer blocks, one after another, on tokens (B, L, D)."""
        if not blocks:
            return tokens
        normed = _norm_modulate(tokens, blocks[0].attention_norm1.weight, modulation[0, 0, :, 0])
        for index, block in enumerate(blocks):
            _, gate_msa, scale_mlp, gate_mlp = modulation[index].unbind(2)
            tokens, normed = self.join(
                [self._attend(block.attention, normed, rotation)],
                tokens,
                gate_msa,
                None,
                scale_mlp,
                update_weight=block.attention_norm2.weight,
                norm_weight=block.ffn_norm1.weight,
                eps=NORM_EPS,
            )
            last = index + 1 == len(blocks)
            tokens, normed = self.join(
                [self._feed_forward(block.feed_forward, normed)],
                tokens,
                gate_mlp,
                None,
                None if last else modulation[index + 1, :, :, 0],
                update_weight=block.ffn_norm2.weight,
                norm_weight=None if last else blocks[index + 1].attention_norm1.weight,
                eps=NORM_EPS,
            )
        return normed

    def _caption_block(self, block: Any, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        """A block without modulation; runs once per generation."""

        def norm(module: Any, value: torch.Tensor) -> torch.Tensor:
            return rms_norm(value, module.weight, NORM_EPS)

        project, attended = self._attend(block.attention, norm(block.attention_norm1, x), rotation)
        x = x + norm(block.attention_norm2, project(attended))
        project, hidden = self._feed_forward(block.feed_forward, norm(block.ffn_norm1, x))
        return x + norm(block.ffn_norm2, project(hidden))

    def _attend(self, module: Any, x: torch.Tensor, rotation: torch.Tensor) -> Product:
        """Attention; returns what is left to project."""
        qkv = module.to_qkv(x).unflatten(-1, (3, -1, self.config["head_dim"]))
        heads = (qkv, module.norm_q.weight, module.norm_k.weight)
        return module.to_out[0], attention(*rotated_heads([heads], rotation, None))

    def _feed_forward(self, module: Any, x: torch.Tensor) -> Product:
        """The MLP up to its last linear, and that."""
        return module.w2, silu_gate(module.w13(x))

    def _unpatchify(
        self, tokens: torch.Tensor, adaln: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """(B, L, D) → (B, C, H, W)."""
        final = self.model.all_final_layer[_EMBEDDER]
        _, channels, height, width = shape
        rows, columns = height // PATCH, width // PATCH
        scale = final.adaLN_modulation[1](F.silu(adaln)).unsqueeze(1)
        tokens = F.layer_norm(tokens[:, : rows * columns], tokens.shape[-1:], eps=1e-6)
        patches = final.linear(tokens * (1 + scale))
        patches = patches.unflatten(1, (rows, columns)).unflatten(3, (PATCH, PATCH, channels))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
