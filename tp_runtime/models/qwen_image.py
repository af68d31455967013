"""Qwen-Image and Qwen-Image-Edit: two streams of tokens, which meet in attention.

The module tree is diffusers' ``QwenImageTransformer2DModel`` (diffusers 0.42,
models/transformers/transformer_qwenimage.py) and so are the names in ComfyUI's files; the
arithmetic of ``Driver`` follows ComfyUI's ``QwenImageTransformer2DModel._forward`` (ComfyUI 0.3.75,
comfy/ldm/qwen_image/model.py), whose results it reproduces.

Shapes: B batch, C latent channels, H W latent size, L tokens, D model width, N heads on this rank,
K head width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import CheckpointError, InputError
from ..files.safetensors_file import TensorInfo
from ..sharding.block_costs import Stage
from ..sharding.parts import Source, Sources
from ..sharding.plan import QKV, Column, Plan, Replicated, Row, Split
from .dual_stream import (
    NORM_EPS,
    Block,
    add_residuals,
    check_residuals,
    dual_block,
    gathered_modulation,
    grid_positions,
    modulate_streams,
    pack_patches,
    place_references,
    residuals_between,
    skipped_blocks,
    unpack_patches,
)
from .layers import (
    Conditioning,
    DriverBase,
    check_context,
    count_blocks,
    rms_norm,
    rope_rotation,
    timestep_embedding,
)

FAMILY = "qwen_image"
LABEL = "Qwen-Image"
UNUSED: frozenset[str] = frozenset()
DIFFUSERS_CLASS = "QwenImageTransformer2DModel"
SWAPPED_HALVES: frozenset[str] = frozenset()

MLP_RATIO = 4
PATCH_AREA = 4
ROPE_THETA = 10000.0
TIME_SCALE = 1000.0
TIME_CHANNELS = 256
# ComfyUI's name → ours. It knows no "uxo" here and takes it for "offset".
REFERENCE_METHODS = {
    "index": "index",
    "negative_index": "negative_index",
    "offset": "offset",
    "uxo": "offset",
}

# Tensors that only a variant has, which computes differently.
_VARIANTS = {
    "__index_timestep_zero__": "Qwen-Image-Edit-2511",
    "time_text_embed.addition_t_embedding.weight": "Qwen-Image-Layered",
}
# The same in the config.json of a diffusers folder: what such a variant sets to true.
_VARIANT_SETTINGS = {
    "zero_cond_t": "Qwen-Image-Edit-2511",
    "use_additional_t_cond": "Qwen-Image-Layered",
    "use_layer3d_rope": "Qwen-Image-Layered",
}


# --- the file ----------------------------------------------------------------------------------


def recognises(tensors: Mapping[str, TensorInfo]) -> bool:
    """The norm of the text and the text's own projections in attention."""
    return {"txt_norm.weight", "transformer_blocks.0.attn.add_q_proj.weight"} <= tensors.keys()


def infer_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The sizes of the model, from its tensors' shapes. Raises KeyError for a missing tensor."""
    for name, variant in _VARIANTS.items():
        if name in tensors:
            raise CheckpointError(
                f"This is a {variant} file (it has the tensor {name}), which cannot be split yet. "
                "Load it with the stock 'Load Diffusion Model' node."
            )
    dim, packed = tensors["img_in.weight"].shape
    (head_dim,) = tensors["transformer_blocks.0.attn.norm_q.weight"].shape
    if head_dim % 16 or dim % head_dim:
        raise CheckpointError(
            f"A Qwen-Image file of width {dim} with heads of {head_dim}: heads must be a multiple "
            "of 16 and divide the width. The file is damaged or of another architecture."
        )
    along = head_dim * 7 // 32 * 2  # features for a row and for a column: 56 of 128
    return {
        "dim": dim,
        "num_heads": dim // head_dim,
        "head_dim": head_dim,
        "num_blocks": count_blocks(tensors, "transformer_blocks"),
        "in_channels": packed // PATCH_AREA,
        "out_channels": tensors["proj_out.weight"].shape[0] // PATCH_AREA,
        "context_dim": tensors["txt_norm.weight"].shape[0],
        "axes_dims": (head_dim - 2 * along, along, along),
    }


def file_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the ComfyUI file."""
    dim, mlp = config["dim"], MLP_RATIO * config["dim"]
    linears = {
        "img_in": (dim, PATCH_AREA * config["in_channels"]),
        "txt_in": (dim, config["context_dim"]),
        "time_text_embed.timestep_embedder.linear_1": (dim, TIME_CHANNELS),
        "time_text_embed.timestep_embedder.linear_2": (dim, dim),
        "norm_out.linear": (2 * dim, dim),
        "proj_out": (PATCH_AREA * config["out_channels"], dim),
    }
    shapes: dict[str, tuple[int, ...]] = {"txt_norm.weight": (config["context_dim"],)}
    for index in range(config["num_blocks"]):
        path = f"transformer_blocks.{index}"
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            linears[f"{path}.attn.{name}"] = (dim, dim)
        for name in ("to_out.0", "to_add_out"):
            linears[f"{path}.attn.{name}"] = (dim, dim)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes[f"{path}.attn.{name}.weight"] = (config["head_dim"],)
        for stream in ("img", "txt"):
            linears |= {
                f"{path}.{stream}_mod.1": (6 * dim, dim),
                f"{path}.{stream}_mlp.net.0.proj": (mlp, dim),
                f"{path}.{stream}_mlp.net.2": (dim, mlp),
            }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def sources(config: dict[str, Any]) -> Sources:
    """Where the file keeps a parameter of the diffusers module: under the same name."""
    shapes = file_tensors(config)
    return lambda parameter: (Source(parameter, 0, shapes[parameter][0]),)


def diffusers_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a diffusers folder's config.json gives. Raises KeyError for one it lacks."""
    for name, variant in _VARIANT_SETTINGS.items():
        if settings.get(name):
            raise CheckpointError(
                f"This is a {variant} folder (its config.json sets {name}), which cannot be split "
                "yet. Load the model with stock nodes."
            )
    head_dim = settings["attention_head_dim"]
    return {
        "dim": settings["num_attention_heads"] * head_dim,
        "head_dim": head_dim,
        "num_blocks": settings["num_layers"],
        "in_channels": settings["in_channels"] // PATCH_AREA,
        "out_channels": settings["out_channels"],
        "context_dim": settings["joint_attention_dim"],
    }


def latent_shape(config: dict[str, Any], width: int, height: int) -> tuple[int, ...]:
    """Shape of one latent for a picture of ``width`` x ``height`` pixels."""
    return config["in_channels"], 1, height // 8, width // 8


# --- the model ---------------------------------------------------------------------------------


def plan(config: dict[str, Any]) -> Plan:
    """Everything with weight is split; what is left is the first and last projection."""
    head_dim, num_heads = config["head_dim"], config["num_heads"]
    heads = Split(num_heads, head_dim)
    block = "transformer_blocks.*"
    return Plan(
        {
            "img_in": Replicated(),
            "txt_in": Column(gather=True),
            "time_text_embed.timestep_embedder.linear_1": Column(),
            "time_text_embed.timestep_embedder.linear_2": Row(),
            f"{block}.attn.{{to_q,to_k,to_v}}": QKV("to_qkv", head_dim, num_heads, num_heads),
            f"{block}.attn.{{add_q_proj,add_k_proj,add_v_proj}}": QKV(
                "to_added_qkv", head_dim, num_heads, num_heads
            ),
            f"{block}.attn.to_out.0": Row((heads,)),
            f"{block}.attn.to_add_out": Row((heads,)),
            # The modulation of all blocks is gathered by the driver, at once.
            f"{block}.img_mod.1": Column(),
            f"{block}.txt_mod.1": Column(),
            f"{block}.img_mlp.net.0.proj": Column(),
            f"{block}.img_mlp.net.2": Row(),
            f"{block}.txt_mlp.net.0.proj": Column(),
            f"{block}.txt_mlp.net.2": Row(),
            "norm_out.linear": Column(gather=True),
            "proj_out": Replicated(),
        }
    )


def stages(config: dict[str, Any], image_tokens: int, text_tokens: int) -> list[Stage]:
    """The blocks of one evaluation. ``image_tokens``: with references."""
    dim = config["dim"]
    heads, ffn = Split(config["num_heads"], config["head_dim"]), Split(MLP_RATIO * dim)
    streams = text_tokens, image_tokens
    return [Stage(config["num_blocks"], streams, dim, heads, ffn, (dim, 6 * dim))]


def build(config: dict[str, Any]) -> nn.Module:
    """The diffusers module with the file's sizes. Call it under ``torch.device("meta")``."""
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=PATCH_AREA * config["in_channels"],
        out_channels=config["out_channels"],
        num_layers=config["num_blocks"],
        attention_head_dim=config["head_dim"],
        num_attention_heads=config["num_heads"],
        joint_attention_dim=config["context_dim"],
        axes_dims_rope=config["axes_dims"],
    )


class Driver(DriverBase):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    label = LABEL

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        attention_mask: torch.Tensor | None = None,  # noqa: ARG002  (ComfyUI ignores it, too)
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str = "index",
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``text`` (B, L, D); ``rotation`` of text, image and references.

        If present: ``references`` (B, L, D), and the blocks to ``skip``.
        """
        self._check(x, context, ref_latents, ref_latents_method)
        positions = _positions(x, context, ref_latents, ref_latents_method)
        rotation = rope_rotation(positions, self.config["axes_dims"], ROPE_THETA)
        text = rms_norm(context, self.model.txt_norm.weight, NORM_EPS)
        found = {
            "text": self.model.txt_in(text),
            "rotation": rotation.to(x.dtype),  # ComfyUI rotates in the model's dtype here
        }
        if ref_latents:
            packed = torch.cat([pack_patches(latent[:, :, 0]) for latent in ref_latents], dim=1)
            found["references"] = self.model.img_in(packed)
        skip = skipped_blocks(transformer_options)
        if skip:
            found["skip"] = skip
        return found

    def step(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rotation: torch.Tensor,
        references: torch.Tensor | None = None,
        skip: Sequence[Block] = (),
        control: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, 1, H, W) → the same."""
        image = self.model.img_in(pack_patches(x[:, :, 0]))
        num_image = image.shape[1]
        if references is not None:
            image = torch.cat((image, references), dim=1)
        # Scaled after the frequencies, unlike FLUX: the order shows in the last bits.
        sinusoids = timestep_embedding(timesteps, TIME_CHANNELS, scale=TIME_SCALE).to(x.dtype)
        activated = F.silu(self.model.time_text_embed.timestep_embedder(sinusoids))
        blocks = self.model.transformer_blocks
        # Of both streams, the text's first: (blocks, 2, B, 6, D).
        of_blocks = gathered_modulation(
            [linear for block in blocks for linear in (block.txt_mod[1], block.img_mod[1])],
            activated,
            self.gather,
            6,
            self.config["dim"],
        ).unflatten(0, (-1, 2))
        scale_and_shift = self.model.norm_out.linear(activated).unflatten(-1, (2, -1))
        numbers: list[Block] = [("double_block", index) for index in range(len(blocks))]
        residuals = residuals_between(control, numbers, skip)
        kept = [index for kind, index in numbers if (kind, index) not in skip]
        # Shift and scale of every block's first norm, and of the last norm.
        norms = [*(of_blocks[index][..., :2, :] for index in kept)]
        norms.append(scale_and_shift.flip(1).expand(2, -1, -1, -1))

        num_text = text.shape[1]
        tokens = torch.cat((text, image), dim=1)
        add_residuals(tokens, residuals[0], num_text)
        normed = modulate_streams(tokens[:, :num_text], tokens[:, num_text:], norms[0])
        for number, index in enumerate(kept, 1):
            block = blocks[index]
            tokens, normed = dual_block(
                self.join,
                block.attn,
                (block.txt_mlp, block.img_mlp),
                tokens,
                normed,
                num_text,
                of_blocks[index],
                norms[number],
                rotation,
                residuals=residuals[number],
            )
        image = self.model.proj_out(normed[:, num_text : num_text + num_image])
        return unpack_patches(image, x.shape[-2], x.shape[-1]).unsqueeze(2)

    def check_control(
        self, batch: int, conditioning: Conditioning, control: Mapping[str, Any]
    ) -> None:
        """Raises InputError."""
        check_residuals(control, batch, conditioning, self.config["dim"], LABEL)

    def _check(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        references: Sequence[torch.Tensor],
        method: str,
    ) -> None:
        channels = self.config["in_channels"]
        if x.ndim != 5 or x.shape[1:3] != (channels, 1):
            raise InputError(
                f"{LABEL} works on latents of shape (batch, {channels}, 1, height, width); got "
                f"{tuple(x.shape)}. Use an empty latent node for 16-channel latents."
            )
        check_context(context, x.shape[0], self.config["context_dim"], LABEL)
        for reference in references:
            if reference.ndim != 5 or reference.shape[:3] != x.shape[:3]:
                raise InputError(
                    f"Reference latents of {LABEL} have the shape ({x.shape[0]}, {channels}, 1, "
                    f"height, width); got {tuple(reference.shape)}."
                )
        if references and method not in REFERENCE_METHODS:
            raise InputError(
                f"{LABEL} on the process group does not support the reference latents method "
                f"'{method}'. Supported: {', '.join(REFERENCE_METHODS)}."
            )


def _positions(
    x: torch.Tensor, context: torch.Tensor, references: Sequence[torch.Tensor], method: str
) -> torch.Tensor:
    """Positions (L, 3) of text, image and references.

    Every picture is centred on zero; the text counts on, on all axes, from the image's edge.
    """

    def along(start: int, size: int) -> torch.Tensor:
        steps = -(-size // 2)
        # In the latents' dtype, as ComfyUI does: bf16 rounds positions beyond 256.
        line = torch.linspace(start, start + steps - 1, steps, dtype=x.dtype, device=x.device)
        return line.float() - steps // 2

    height, width = x.shape[-2:]
    first = max(-(-width // 2) // 2, -(-height // 2) // 2)
    text = torch.arange(first, first + context.shape[1], dtype=torch.float32, device=x.device)
    positions = [
        text[:, None].expand(-1, 3),
        grid_positions(0, along(0, height), along(0, width)),
    ]
    places = place_references(references, REFERENCE_METHODS[method], height, width)
    for reference, (index, top, left) in zip(references, places, strict=True):
        y = along((top + 1) // 2, reference.shape[-2])
        positions.append(grid_positions(index, y, along((left + 1) // 2, reference.shape[-1])))
    return torch.cat(positions)
