"""What the families with a stream of text and one of image tokens share (FLUX.1, Qwen-Image).

Patches, positions, references, joint attention, ControlNet residuals. Rank half. Their attention
modules have diffusers' names; the arithmetic is ComfyUI's (0.3.75, comfy/ldm/flux/ and
comfy/ldm/qwen_image/), whose order of operations shows in the last bits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..acceleration import fused
from ..errors import InputError
from .common import Conditioning, Gather, Heads, attention, rotated_heads

NORM_EPS = 1e-6

# --- blocks ------------------------------------------------------------------------------------


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=NORM_EPS), 1 + scale)


@fused
def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights, then scaled and shifted."""
    return _modulated(x, shift, scale)


@fused
def residual_then_modulate(
    x: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` plus the gated update, and ``modulate`` of that sum."""
    x = x + update * gate
    return x, _modulated(x, shift, scale)


def joint_attention(
    module: Any,
    text: torch.Tensor,
    image: torch.Tensor,
    rotation: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over both streams, projected separately: modulated text and image → the same."""
    length = text.shape[1]
    of_text = heads_of(module.to_added_qkv(text), module.norm_added_q, module.norm_added_k)
    of_image = heads_of(module.to_qkv(image), module.norm_q, module.norm_k)
    q, k, v = rotated_heads([of_text, of_image], rotation, NORM_EPS)
    attended = attention(q, k, v, mask)
    return module.to_add_out(attended[:, :length]), module.to_out[0](attended[:, length:])


def heads_of(qkv: torch.Tensor, norm_q: Any, norm_k: Any) -> Heads:
    """What ``rotated_heads`` takes, of (B, L, 3·N·K)."""
    head_dim = norm_q.weight.shape[0]
    return qkv.unflatten(-1, (3, -1, head_dim)), norm_q.weight, norm_k.weight


def gathered_modulation(
    linears: Sequence[Any], activated: torch.Tensor, gather: Gather, width: int
) -> list[torch.Tensor]:
    """The outputs (B, 1, width) of column-parallel linears on (B, D), with one gather for all."""
    if not linears:
        return []
    local = torch.stack([linear(activated) for linear in linears])
    return list(gather(local)[..., :width].unsqueeze(2).unbind())


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


# --- ControlNets -------------------------------------------------------------------------------


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


def add_residual(
    tokens: torch.Tensor,
    control: Mapping[str, Any] | None,
    stack: str,
    index: int,
    start: int = 0,
) -> None:
    """Add, in place, what a ControlNet has for this block to the tokens from ``start`` on."""
    residuals = (control or {}).get(stack) or ()
    residual = residuals[index] if index < len(residuals) else None
    if residual is not None:
        tokens[:, start : start + residual.shape[1]] += residual
