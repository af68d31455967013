"""FLUX.1 (dev, schnell, Krea, Kontext, Fill, Canny, Depth): two streams of tokens, then one.

The module tree is diffusers' ``FluxTransformer2DModel`` (diffusers 0.42,
models/transformers/transformer_flux.py); the arithmetic of ``Driver`` follows ComfyUI's
``Flux._forward`` (ComfyUI 0.3.75, comfy/ldm/flux/model.py), whose results it reproduces.

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
from ..gpu.graphs import optimising
from ..sharding.block_costs import Stage
from ..sharding.parts import Source, Sources
from ..sharding.plan import QKV, Column, MergedColumn, Plan, Replicated, Row, Split
from .dual_stream import (
    NORM_EPS,
    Block,
    add_residuals,
    check_residuals,
    dual_block,
    gathered_modulation,
    grid_positions,
    heads_of,
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
    Product,
    attention,
    check_context,
    count_blocks,
    rope_rotation,
    rotated_heads,
    timestep_embedding,
)

FAMILY = "flux"
LABEL = "FLUX.1"
UNUSED: frozenset[str] = frozenset()
DIFFUSERS_CLASS = "FluxTransformer2DModel"
SWAPPED_HALVES = frozenset({"norm_out.linear"})  # shift, scale in the file; scale, shift there

MLP_RATIO = 4
PATCH_AREA = 4
ROPE_THETA = 10000.0
TIME_SCALE = 1000.0
TIME_CHANNELS = 256
REFERENCE_METHODS = ("offset", "index", "uxo")


# --- the file ----------------------------------------------------------------------------------


def recognises(tensors: Mapping[str, TensorInfo]) -> bool:
    """FLUX.2 has no ``vector_in``, Chroma no ``img_mod``, HunyuanVideo no linear ``txt_in``."""
    return {"double_blocks.0.img_mod.lin.weight", "vector_in.in_layer.weight", "txt_in.weight"} <= (
        tensors.keys()
    )


def infer_config(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """The sizes of the model, from its tensors' shapes. Raises KeyError for a missing tensor."""
    # ComfyUI has called the weight of q and k norm "scale", and calls it "weight" today.
    norm = "double_blocks.0.img_attn.norm.query_norm"
    norm_name = "weight" if f"{norm}.weight" in tensors else "scale"
    (head_dim,) = tensors[f"{norm}.{norm_name}"].shape
    dim, packed = tensors["img_in.weight"].shape
    if head_dim % 16 or dim % head_dim:
        raise CheckpointError(
            f"A FLUX.1 file of width {dim} with heads of {head_dim}: heads must be a multiple of "
            "16 and divide the width. The file is damaged or of another architecture."
        )
    along = head_dim * 7 // 32 * 2  # features for a row and for a column: 56 of 128
    return {
        "dim": dim,
        "num_heads": dim // head_dim,
        "head_dim": head_dim,
        "num_double_blocks": count_blocks(tensors, "double_blocks"),
        "num_single_blocks": count_blocks(tensors, "single_blocks"),
        "in_channels": packed // PATCH_AREA,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // PATCH_AREA,
        "context_dim": tensors["txt_in.weight"].shape[1],
        "vector_dim": tensors["vector_in.in_layer.weight"].shape[1],
        "guidance": "guidance_in.in_layer.weight" in tensors,
        "axes_dims": (head_dim - 2 * along, along, along),
        "norm_name": norm_name,
    }


def file_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the ComfyUI file."""
    dim, mlp = config["dim"], MLP_RATIO * config["dim"]
    linears = {
        "img_in": (dim, PATCH_AREA * config["in_channels"]),
        "txt_in": (dim, config["context_dim"]),
        "final_layer.linear": (PATCH_AREA * config["out_channels"], dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    embedders = {"time_in": TIME_CHANNELS, "vector_in": config["vector_dim"]}
    if config["guidance"]:
        embedders["guidance_in"] = TIME_CHANNELS
    for name, width in embedders.items():
        linears |= {f"{name}.in_layer": (dim, width), f"{name}.out_layer": (dim, dim)}
    norms = []
    for index in range(config["num_double_blocks"]):
        for stream in ("img", "txt"):
            path = f"double_blocks.{index}.{stream}"
            linears |= {
                f"{path}_mod.lin": (6 * dim, dim),
                f"{path}_attn.qkv": (3 * dim, dim),
                f"{path}_attn.proj": (dim, dim),
                f"{path}_mlp.0": (mlp, dim),
                f"{path}_mlp.2": (dim, mlp),
            }
            norms.append(f"{path}_attn.norm")
    for index in range(config["num_single_blocks"]):
        path = f"single_blocks.{index}"
        linears |= {
            f"{path}.modulation.lin": (3 * dim, dim),
            f"{path}.linear1": (3 * dim + mlp, dim),
            f"{path}.linear2": (dim, dim + mlp),
        }
        norms.append(f"{path}.norm")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        for which in ("query_norm", "key_norm"):
            shapes[f"{name}.{which}.{config['norm_name']}"] = (config["head_dim"],)
    return shapes


# Our module → the file's, and which of its rows in units of the model's width (None: all).
_Rows = tuple[int, int] | None
_OUTSIDE: dict[str, str] = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
} | {
    f"time_text_embed.{ours}.linear_{number}": f"{theirs}.{layer}_layer"
    for ours, theirs in (
        ("timestep_embedder", "time_in"),
        ("guidance_embedder", "guidance_in"),
        ("text_embedder", "vector_in"),
    )
    for number, layer in ((1, "in"), (2, "out"))
}
_DOUBLE: dict[str, tuple[str, _Rows]] = {
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
    "attn.to_q": ("img_attn.qkv", (0, 1)),
    "attn.to_k": ("img_attn.qkv", (1, 2)),
    "attn.to_v": ("img_attn.qkv", (2, 3)),
    "attn.add_q_proj": ("txt_attn.qkv", (0, 1)),
    "attn.add_k_proj": ("txt_attn.qkv", (1, 2)),
    "attn.add_v_proj": ("txt_attn.qkv", (2, 3)),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "attn.norm_q": ("img_attn.norm.query_norm", None),
    "attn.norm_k": ("img_attn.norm.key_norm", None),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", None),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
}
_SINGLE: dict[str, tuple[str, _Rows]] = {
    "norm.linear": ("modulation.lin", None),
    "attn.to_q": ("linear1", (0, 1)),
    "attn.to_k": ("linear1", (1, 2)),
    "attn.to_v": ("linear1", (2, 3)),
    "proj_mlp": ("linear1", (3, 3 + MLP_RATIO)),
    "proj_out": ("linear2", None),
    "attn.norm_q": ("norm.query_norm", None),
    "attn.norm_k": ("norm.key_norm", None),
}
_STACKS = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}


def sources(config: dict[str, Any]) -> Sources:
    """Where the file keeps a parameter of the diffusers module."""
    shapes, dim = file_tensors(config), config["dim"]

    def find(parameter: str) -> tuple[Source, ...]:
        module, _, kind = parameter.rpartition(".")
        stack, _, within = module.partition(".")
        rows: _Rows = None
        if stack in _STACKS:
            index, _, within = within.partition(".")
            file_stack, names = _STACKS[stack]
            name, rows = names[within]
            name = f"{file_stack}.{index}.{name}"
        else:
            name = _OUTSIDE[module]
        if name.endswith("_norm"):
            kind = config["norm_name"]
        name = f"{name}.{kind}"
        start, stop = (0, shapes[name][0]) if rows is None else (rows[0] * dim, rows[1] * dim)
        return (Source(name, start, stop),)

    return find


def diffusers_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes that a diffusers folder's config.json gives. Raises KeyError for one it lacks."""
    head_dim = settings["attention_head_dim"]
    in_channels = settings["in_channels"]
    return {
        "dim": settings["num_attention_heads"] * head_dim,
        "head_dim": head_dim,
        "num_double_blocks": settings["num_layers"],
        "num_single_blocks": settings["num_single_layers"],
        "in_channels": in_channels // PATCH_AREA,
        "out_channels": (settings.get("out_channels") or in_channels) // PATCH_AREA,
        "context_dim": settings["joint_attention_dim"],
        "vector_dim": settings["pooled_projection_dim"],
        "guidance": settings.get("guidance_embeds", False),
        "norm_name": "scale",
    }


def latent_shape(config: dict[str, Any], width: int, height: int) -> tuple[int, ...]:
    """Shape of one latent for a picture of ``width`` x ``height`` pixels."""
    return config["out_channels"], height // 8, width // 8


# --- the model ---------------------------------------------------------------------------------


def plan(config: dict[str, Any]) -> Plan:
    """Everything with weight is split; what is left is the first and last projection."""
    head_dim, num_heads = config["head_dim"], config["num_heads"]
    heads = Split(num_heads, head_dim)
    double, single = "transformer_blocks.*", "single_transformer_blocks.*"
    return Plan(
        {
            "x_embedder": Replicated(),
            "context_embedder": Column(gather=True),
            "time_text_embed.*.linear_1": Column(),
            "time_text_embed.*.linear_2": Row(),
            # The modulation of all blocks is gathered by the driver, at once.
            f"{double}.norm1.linear": Column(),
            f"{double}.norm1_context.linear": Column(),
            f"{double}.attn.{{to_q,to_k,to_v}}": QKV("to_qkv", head_dim, num_heads, num_heads),
            f"{double}.attn.{{add_q_proj,add_k_proj,add_v_proj}}": QKV(
                "to_added_qkv", head_dim, num_heads, num_heads
            ),
            f"{double}.attn.to_out.0": Row((heads,)),
            f"{double}.attn.to_add_out": Row((heads,)),
            f"{double}.ff.net.0.proj": Column(),
            f"{double}.ff.net.2": Row(),
            f"{double}.ff_context.net.0.proj": Column(),
            f"{double}.ff_context.net.2": Row(),
            f"{single}.norm.linear": Column(),
            f"{single}.{{attn.to_q,attn.to_k,attn.to_v,proj_mlp}}": MergedColumn(
                "linear1", (head_dim, head_dim, head_dim, 1)
            ),
            f"{single}.proj_out": Row((heads, Split(MLP_RATIO * config["dim"]))),
            "norm_out.linear": Column(gather=True),
            "proj_out": Replicated(),
        }
    )


def stages(config: dict[str, Any], image_tokens: int, text_tokens: int) -> list[Stage]:
    """The blocks of one evaluation. ``image_tokens``: with references."""
    dim = config["dim"]
    heads, ffn = Split(config["num_heads"], config["head_dim"]), Split(MLP_RATIO * dim)
    doubles, singles = config["num_double_blocks"], config["num_single_blocks"]
    tokens = text_tokens + image_tokens
    return [
        Stage(doubles, (text_tokens, image_tokens), dim, heads, ffn, (dim, 6 * dim)),
        Stage(singles, (tokens,), dim, heads, ffn, (dim, 3 * dim), parallel=True),
    ]


def build(config: dict[str, Any]) -> nn.Module:
    """The diffusers module with the file's sizes. Call it under ``torch.device("meta")``."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=PATCH_AREA * config["in_channels"],
        out_channels=PATCH_AREA * config["out_channels"],
        num_layers=config["num_double_blocks"],
        num_single_layers=config["num_single_blocks"],
        attention_head_dim=config["head_dim"],
        num_attention_heads=config["num_heads"],
        joint_attention_dim=config["context_dim"],
        pooled_projection_dim=config["vector_dim"],
        guidance_embeds=config["guidance"],
        axes_dims_rope=config["axes_dims"],
    )


def _attended_and_gelu(attended: torch.Tensor, mlp: torch.Tensor) -> torch.Tensor:
    if optimising():
        from ..gpu import kernels  # here, since ComfyUI's process imports this module, too

        return kernels.attended_and_gelu(attended, mlp)
    return torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1)


class Driver(DriverBase):
    """Evaluates the sharded module on ComfyUI's forward arguments."""

    label = LABEL

    def condition(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        ref_latents: Sequence[torch.Tensor] = (),
        ref_latents_method: str = "offset",
        attention_mask: torch.Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
    ) -> Conditioning:
        """``text`` (B, L, D); ``rotation`` of text, image and references; ``vector`` (B, D) from y.

        If present: ``guidance`` (B, D), ``references`` (B, L, D), ``mask``, and the blocks to
        ``skip``.
        """
        self._check(x, context, ref_latents, ref_latents_method)
        rope_options = (transformer_options or {}).get("rope_options") or {}
        positions = _positions(x, context, ref_latents, ref_latents_method, rope_options)
        mask = None if attention_mask is None else _mask(attention_mask, len(positions))
        if y is None:
            y = x.new_zeros(x.shape[0], self.config["vector_dim"])
        embedders = self.model.time_text_embed
        found = {
            "text": self.model.context_embedder(context),
            "rotation": rope_rotation(positions, self.config["axes_dims"], ROPE_THETA),
            "vector": embedders.text_embedder(y[:, : self.config["vector_dim"]]),
        }
        if guidance is not None and self.config["guidance"]:
            # Scaled in its own dtype, as ComfyUI does.
            sinusoids = timestep_embedding(TIME_SCALE * guidance, TIME_CHANNELS)
            found["guidance"] = embedders.guidance_embedder(sinusoids.to(x.dtype))
        if ref_latents:
            packed = torch.cat([pack_patches(reference) for reference in ref_latents], dim=1)
            found["references"] = self.model.x_embedder(packed)
        if mask is not None:
            found["mask"] = mask
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
        vector: torch.Tensor,
        guidance: torch.Tensor | None = None,
        references: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        skip: Sequence[Block] = (),
        control: Mapping[str, Any] | None = None,
    ) -> torch.Tensor:
        """(B, C, H, W) → (B, out_channels, H, W)."""
        image = self.model.x_embedder(pack_patches(x))
        num_image, num_text = image.shape[1], text.shape[1]
        if references is not None:
            image = torch.cat((image, references), dim=1)
        sinusoids = timestep_embedding(TIME_SCALE * timesteps, TIME_CHANNELS).to(x.dtype)
        time = self.model.time_text_embed.timestep_embedder(sinusoids)
        if guidance is not None:
            time = time + guidance
        activated = F.silu(time + vector)
        doubles, singles = self.model.transformer_blocks, self.model.single_transformer_blocks
        # Of both streams, the text's first, (blocks, 2, B, 6, D); of one, (blocks, 1, B, 3, D).
        of_doubles = self._modulation(
            [norm for block in doubles for norm in (block.norm1_context, block.norm1)], activated, 6
        ).unflatten(0, (-1, 2))
        of_singles = self._modulation([block.norm for block in singles], activated, 3)[:, None]
        last = self.model.norm_out.linear(activated).unflatten(-1, (2, -1))[None]
        blocks: list[Block] = [("double_block", index) for index in range(len(doubles))]
        blocks += [("single_block", index) for index in range(len(singles))]
        modulation = dict(zip(blocks, [*of_doubles, *of_singles], strict=True))
        residuals = residuals_between(control, blocks, skip)
        blocks = [block for block in blocks if block not in skip]
        # Shift and scale of every block's first norm, and of the last norm.
        norms = [*(modulation[block][..., :2, :] for block in blocks), last]

        tokens = torch.cat((text, image), dim=1)
        add_residuals(tokens, residuals[0], num_text)
        streams = tokens[:, :num_text], tokens[:, num_text:]
        normed = modulate_streams(*streams, norms[0].expand(2, -1, -1, -1))
        for number, (kind, index) in enumerate(blocks, 1):
            of_block = modulation[kind, index]
            if kind == "double_block":
                block = doubles[index]
                tokens, normed = dual_block(
                    self.join,
                    block.attn,
                    (block.ff_context, block.ff),
                    tokens,
                    normed,
                    num_text,
                    of_block,
                    norms[number].expand(2, -1, -1, -1),
                    rotation,
                    mask=mask,
                    residuals=residuals[number],
                    limit=True,
                )
            else:
                product = _single(singles[index], normed, rotation, mask)
                add_residuals(tokens, residuals[number], num_text)
                gate, next_norm = of_block[..., 2, :], norms[number].unbind(2)
                tokens, normed = self.join(
                    [product], tokens, gate, *next_norm, eps=NORM_EPS, limit=True
                )
        image = self.model.proj_out(normed[:, num_text : num_text + num_image])
        return unpack_patches(image, x.shape[-2], x.shape[-1])

    def check_control(
        self, batch: int, conditioning: Conditioning, control: Mapping[str, Any]
    ) -> None:
        """Raises InputError."""
        check_residuals(control, batch, conditioning, self.config["dim"], LABEL)

    def _modulation(
        self, norms: Sequence[Any], activated: torch.Tensor, count: int
    ) -> torch.Tensor:
        linears = [norm.linear for norm in norms]
        return gathered_modulation(linears, activated, self.gather, count, self.config["dim"])

    def _check(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        references: Sequence[torch.Tensor],
        method: str,
    ) -> None:
        channels = self.config["in_channels"]
        if x.ndim != 4 or x.shape[1] != channels:
            raise InputError(
                f"This {LABEL} model works on latents of shape (batch, {channels}, height, width); "
                f"got {tuple(x.shape)}. Use an empty latent node for 16-channel latents."
            )
        check_context(context, x.shape[0], self.config["context_dim"], LABEL)
        for reference in references:
            if reference.ndim != 4 or reference.shape[:2] != x.shape[:2]:
                raise InputError(
                    f"Reference latents of this {LABEL} model have the shape ({x.shape[0]}, "
                    f"{channels}, height, width); got {tuple(reference.shape)}."
                )
        if references and method not in REFERENCE_METHODS:
            raise InputError(
                f"{LABEL} on the process group does not support the reference latents method "
                f"'{method}'. Supported: {', '.join(REFERENCE_METHODS)}."
            )


def _single(
    block: Any, normed: torch.Tensor, rotation: torch.Tensor, mask: torch.Tensor | None
) -> Product:
    """Attention and MLP of one stream, side by side; returns what is left to project."""
    *widths, mlp_width = block.linear1.output_partition_sizes
    qkv, mlp = block.linear1(normed).split((sum(widths), mlp_width), dim=-1)
    heads = heads_of(qkv, block.attn.norm_q, block.attn.norm_k)
    attended = attention(*rotated_heads([heads], rotation, NORM_EPS), mask)
    return block.proj_out, _attended_and_gelu(attended, mlp)


def _positions(
    x: torch.Tensor,
    context: torch.Tensor,
    references: Sequence[torch.Tensor],
    method: str,
    options: Mapping[str, float],
) -> torch.Tensor:
    """Positions (L, 3) of text (all zero), image and references. ``options`` move the image."""

    def along(start: float, size: int, scale: float = 1.0) -> torch.Tensor:
        steps = -(-size // 2)
        end = start + (steps - 1) * scale
        return torch.linspace(start, end, steps, dtype=torch.float32, device=x.device)

    height, width = x.shape[-2:]
    text = torch.zeros(context.shape[1], 3, dtype=torch.float32, device=x.device)
    y = along(options.get("shift_y", 0.0), height, options.get("scale_y", 1.0))
    x_axis = along(options.get("shift_x", 0.0), width, options.get("scale_x", 1.0))
    positions = [text, grid_positions(options.get("shift_t", 0.0), y, x_axis)]
    places = place_references(references, method, height, width)
    for reference, (index, top, left) in zip(references, places, strict=True):
        y = along((top + 1) // 2, reference.shape[-2])
        x_axis = along((left + 1) // 2, reference.shape[-1])
        positions.append(grid_positions(index, y, x_axis))
    return torch.cat(positions)


def _mask(mask: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(L, L), (B, L, L) or (B, 1, L, L) → four axes, as ComfyUI's attention understands them."""
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4 or mask.shape[1:] != (1, num_tokens, num_tokens):
        raise InputError(
            f"The attention mask of the conditioning has the shape {tuple(mask.shape)}; these "
            f"latents and captions are {num_tokens} tokens together."
        )
    return mask
