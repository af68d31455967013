"""What the families with a stream of text and one of image tokens share (FLUX.1, Qwen-Image).

Patches, positions, references, joint attention, ControlNet residuals. Rank half. Their attention
modules have diffusers' names; the arithmetic is ComfyUI's (0.3.75, comfy/ldm/flux/ and
comfy/ldm/qwen_image/), whose order of operations shows in the last bits.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..gpu.graphs import fused
from .layers import Conditioning, Gather, Heads, Product, attention, project, rotated_heads

NORM_EPS = 1e-6

Join = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # DriverBase.join

# --- blocks ------------------------------------------------------------------------------------


@fused
def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights of (B, L, D), then scaled and shifted by (B, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


def modulate_streams(
    text: torch.Tensor, image: torch.Tensor, shift_and_scale: torch.Tensor
) -> torch.Tensor:
    """``modulate`` of both streams, (2, B, 2, D), one behind the other."""
    (text_shift, text_scale), (image_shift, image_scale) = (
        stream.unbind(1) for stream in shift_and_scale
    )
    return torch.cat(
        (modulate(text, text_shift, text_scale), modulate(image, image_shift, image_scale)), dim=1
    )


def joint_attention(
    module: Any,
    normed: torch.Tensor,
    num_text: int,
    rotation: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> list[Product]:
    """Attention over both streams (B, L, D), text first; returns what is left to project."""
    text, image = normed[:, :num_text], normed[:, num_text:]
    of_text = heads_of(project(module.to_added_qkv, text), module.norm_added_q, module.norm_added_k)
    of_image = heads_of(project(module.to_qkv, image), module.norm_q, module.norm_k)
    q, k, v = rotated_heads([of_text, of_image], rotation, NORM_EPS)
    attended = attention(q, k, v, mask)
    return [
        (module.to_add_out, attended[:, :num_text]),
        (module.to_out[0], attended[:, num_text:]),
    ]


def dual_block(
    join: Join,
    attention_module: Any,
    feed_forwards: tuple[Any, Any],
    tokens: torch.Tensor,
    normed: torch.Tensor,
    num_text: int,
    modulation: torch.Tensor,
    next_norm: torch.Tensor,
    rotation: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    residuals: Sequence[torch.Tensor] = (),
    limit: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of two streams, which meet in attention: tokens and their norm → the same.

    ``feed_forwards``: of text and image. ``modulation`` (2, B, 6, D): of the block; ``next_norm``
    (2, B, 2, D): shift and scale of what follows it. ``residuals``: a ControlNet's, for the image.
    """
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(2)
    products = joint_attention(attention_module, normed, num_text, rotation, mask)
    tokens, normed = join(products, tokens, gate, mlp_shift, mlp_scale, eps=NORM_EPS)
    add_residuals(tokens, residuals, num_text)
    streams = normed[:, :num_text], normed[:, num_text:]
    products = [
        (feed_forward.net[2], project(feed_forward.net[0].proj, x, gelu=True))
        for feed_forward, x in zip(feed_forwards, streams, strict=True)
    ]
    return join(products, tokens, mlp_gate, *next_norm.unbind(2), eps=NORM_EPS, limit=limit)


def heads_of(qkv: torch.Tensor, norm_q: Any, norm_k: Any) -> Heads:
    """What ``rotated_heads`` takes, of (B, L, 3·N·K)."""
    head_dim = norm_q.weight.shape[0]
    return qkv.unflatten(-1, (3, -1, head_dim)), norm_q.weight, norm_k.weight


def gathered_modulation(
    linears: Sequence[Any], activated: torch.Tensor, gather: Gather, count: int, dim: int
) -> torch.Tensor:
    """Column-parallel linears on (B, D), with one gather for all: (linears, B, count, dim)."""
    if not linears:
        return activated.new_empty(0, activated.shape[0], count, dim)
    local = torch.stack([linear(activated) for linear in linears])
    return gather(local)[..., : count * dim].unflatten(-1, (count, dim))


# --- patches and positions ---------------------------------------------------------------------


def pack_patches(x: torch.Tensor) -> torch.Tensor:
    """Patches of 2 x 2 as tokens: (B, C, H, W) → (B, L, 4·C); odd sizes are padded circularly."""
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="circular")
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B C h 2 w 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_patches(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, L, 4·C) → (B, C, height, width), the inverse of ``pack_patches``."""
    rows = -(-height // 2)
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, -1))  # B h w C 2 2
    x = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return x[:, :, :height, :width]


def grid_positions(index: float, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Positions (L, 3) of an image's tokens, row by row: ``index``, its row's ``y``, its ``x``."""
    positions = torch.empty(len(y), len(x), 3, dtype=torch.float32, device=y.device)
    positions[..., 0] = index
    positions[..., 1] = y[:, None]
    positions[..., 2] = x
    return positions.flatten(0, 1)


def place_references(
    references: Sequence[torch.Tensor], method: str, height: int, width: int
) -> list[tuple[float, int, int]]:
    """Where reference latents lie beside an image of ``height`` x ``width``: (index, top, left).

    ``method`` is one of: ``"index"`` and ``"negative_index"``, one behind another; ``"uxo"``,
    diagonally below the image; ``"offset"``, side by side on one plane.
    """
    places: list[tuple[float, int, int]] = []
    down = right = 0
    for count, reference in enumerate(references, 1):
        rows, columns = reference.shape[-2:]
        if method in ("index", "negative_index"):
            places.append((float(count if method == "index" else -count), 0, 0))
        elif method == "uxo":
            places.append((0.0, height + height % 2 + down, width + width % 2 + right))
            down, right = down + rows, right + columns
        else:
            assert method == "offset", method
            top, left = (0, right) if rows + down > columns + right else (down, 0)
            places.append((1.0, top, left))
            down, right = max(down, rows + top), max(right, columns + left)
    return places


# --- ControlNets, and blocks that are left out ---------------------------------------------------

Block = tuple[
    str, int
]  # ComfyUI's name of the kind, "double_block" or "single_block", and a number
_RESIDUALS = {"double_block": "input", "single_block": "output"}  # ComfyUI's names, too


def skipped_blocks(transformer_options: Mapping[str, Any] | None) -> tuple[Block, ...]:
    """The blocks that a node has left out: ``skip_blocks`` of the options, by kind."""
    by_kind = (transformer_options or {}).get("skip_blocks") or {}
    return tuple((kind, index) for kind, indices in by_kind.items() for index in indices)


def check_residuals(
    control: Mapping[str, Any], batch: int, conditioning: Conditioning, width: int, label: str
) -> None:
    """Raises InputError if a ControlNet's residual does not fit the image's tokens."""
    length = conditioning["rotation"].shape[1] - conditioning["text"].shape[1]
    stacks = [control.get(name) or () for name in ("input", "output")]
    for residual in (item for stack in stacks for item in stack if item is not None):
        shape = tuple(residual.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] > length or shape[2] != width:
            raise InputError(
                f"The ControlNet gives residuals of shape {shape}; {label} takes up to ({batch}, "
                f"{length}, {width}) here. Use a ControlNet made for {label}."
            )


def residuals_between(
    control: Mapping[str, Any] | None, blocks: Sequence[Block], skip: Collection[Block]
) -> list[list[torch.Tensor]]:
    """What a ControlNet adds to the image's tokens before the first block that is not skipped,
    after it, after the second, and so on. A skipped block's residuals are added all the same.
    """
    found: list[list[torch.Tensor]] = [[]]
    for kind, index in blocks:
        if (kind, index) not in skip:
            found.append([])
        stack = (control or {}).get(_RESIDUALS[kind]) or ()
        if index < len(stack) and stack[index] is not None:
            found[-1].append(stack[index])
    return found


def add_residuals(tokens: torch.Tensor, residuals: Sequence[torch.Tensor], start: int) -> None:
    """Add a ControlNet's residuals in place to the tokens from ``start`` on.

    Before the last join of a block, which only adds to the tokens, is as good as after it.
    """
    for residual in residuals:
        tokens[:, start : start + residual.shape[1]] += residual
