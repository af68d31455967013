"""From pictures to tokens and back: patches, and where each lies, with references beside the image.

The arithmetic is ComfyUI's (0.3.75, comfy/ldm/flux/ and comfy/ldm/qwen_image/), whose order of
operations shows in the last bits.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .family import REFERENCES_MOVE
from .forward import option, unsupported

# ComfyUI's ways to place references: side by side on one plane; one behind another; diagonally
# below the image. And by index, with the modulation of time 0.
REFERENCE_METHODS = ("offset", "index", "uxo")
AT_TIME_ZERO = "index_timestep_zero"


def patch_grid(x: torch.Tensor, patch: int = 2) -> tuple[int, int]:
    """Rows and columns of the patches of latents (..., H, W)."""
    rows, columns = (-(-length // patch) for length in x.shape[-2:])
    return rows, columns


def pack_patches(x: torch.Tensor, patch: int = 2, channels_last: bool = False) -> torch.Tensor:
    """Square patches as tokens: (B, C, H, W) → (B, L, C·patch²), padded circularly.

    Features are in the order of channel, row, column; or the channel comes last.
    """
    padding = 0, -x.shape[-1] % patch, 0, -x.shape[-2] % patch
    x = F.pad(x, padding, mode="circular") if any(padding) else x
    patches = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C h p w q
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return patches.permute(order).flatten(3).flatten(1, 2)


def unpack_patches(
    tokens: torch.Tensor, size: Sequence[int], patch: int = 2, channels_last: bool = False
) -> torch.Tensor:
    """(B, L, C·patch²) → (B, C, *size), the inverse of ``pack_patches``."""
    height, width = size
    rows = -(-height // patch)
    features = (patch, patch, -1) if channels_last else (-1, patch, patch)
    patches = tokens.unflatten(2, features).unflatten(1, (rows, -1))  # B h w, and the features
    x = patches.permute((0, 5, 1, 3, 2, 4) if channels_last else (0, 3, 1, 4, 2, 5))
    return x.flatten(4).flatten(2, 3)[:, :, :height, :width]


def embedded_references(
    embed: Callable[[torch.Tensor], torch.Tensor],
    references: Sequence[torch.Tensor],
    pack: Callable[[torch.Tensor], torch.Tensor] = pack_patches,
) -> torch.Tensor | None:
    """The tokens (B, L, D) of reference latents, one's behind another's; None if there are none."""
    return embed(torch.cat([pack(one) for one in references], dim=1)) if references else None


def counted(length: int, like: torch.Tensor, start: int = 0) -> torch.Tensor:
    """``start``, ``start`` + 1, … (length,) fp32, where ``like`` is."""
    return torch.arange(start, start + length, dtype=torch.float32, device=like.device)


def grid_positions(index: float, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Positions (L, 3) of an image's tokens, row by row: ``index``, its row's ``y``, its ``x``."""
    positions = torch.empty(len(y), len(x), 3, dtype=torch.float32, device=y.device)
    positions[..., 0] = index
    positions[..., 1] = y[:, None]
    positions[..., 2] = x
    return positions.flatten(0, 1)


def reference_positions(
    references: Sequence[torch.Tensor],
    method: str,
    size: Sequence[int],
    along: Callable[[int, int, str], torch.Tensor],
    patch: int = 2,
    step: float = 1.0,
    shift: float = 0.0,
) -> list[torch.Tensor]:
    """Positions of reference latents beside an image of ``size`` (height, width).

    A reference is (B, C, H, W) or (B, C, T, H, W); one of several frames counts these from zero,
    whatever its place is. ``method`` is one of: ``"index"`` and ``"negative_index"``, one behind
    another, ``step`` apart; ``"uxo"``, diagonally below the image; ``"offset"``, side by side on
    one plane. ``shift`` is added to every index. ``along(start, length, axis)``: positions along an
    axis, ``"y"`` or ``"x"``, of the patches of so many latent rows.
    """
    (height, width), found = size, []
    down = right = 0
    for count, reference in enumerate(references, 1):
        rows, columns = reference.shape[-2:]
        index, top, left = 0.0, 0, 0
        if method in ("index", "negative_index"):
            index = step * (count if method == "index" else -count)
        elif method == "uxo":
            top, left = height + -height % patch + down, width + -width % patch + right
            down, right = down + rows, right + columns
        else:
            assert method == "offset", method
            index = 1.0
            top, left = (0, right) if rows + down > columns + right else (down, 0)
            down, right = max(down, rows + top), max(right, columns + left)
        y, x = (
            along((start + patch // 2) // patch, length, axis)
            for start, length, axis in ((top, rows, "y"), (left, columns, "x"))
        )
        frames = reference.shape[2] if reference.ndim == 5 else 1
        found += [
            grid_positions(index + shift if frames == 1 else frame, y, x) for frame in range(frames)
        ]
    return found


def movable_positions(
    x: torch.Tensor,
    num_text: int,
    references: Sequence[torch.Tensor],
    method: str,
    transformer_options: Mapping[str, Any] | None,
    patch: int = 2,
    step: float = 1.0,
) -> torch.Tensor:
    """Positions (L, 3) of text (all zero), image and references.

    ComfyUI's ``rope_options`` move and stretch the image; and the references, if the options say
    ``REFERENCES_MOVE``. ``patch``: latent rows and columns of a token; ``step``: from one reference
    to the next.
    """

    def along(start: int, size: int, axis: str, moved: Mapping[str, float]) -> torch.Tensor:
        steps, first = -(-size // patch), start + moved.get(f"shift_{axis}", 0.0)
        last = first + (steps - 1) * moved.get(f"scale_{axis}", 1.0)
        return torch.linspace(first, last, steps, dtype=torch.float32, device=x.device)

    size = x.shape[-2:]
    text = torch.zeros(num_text, 3, dtype=torch.float32, device=x.device)
    moved = option(transformer_options, "rope_options")
    rows, columns = (along(0, *each, moved) for each in zip(size, "yx", strict=True))
    image = grid_positions(moved.get("shift_t", 0.0), rows, columns)
    if not (transformer_options or {}).get(REFERENCES_MOVE):
        moved = {}
    shift, along_one = moved.get("shift_t", 0.0), partial(along, moved=moved)
    others = reference_positions(references, method, size, along_one, patch, step, shift)
    return torch.cat([text, image, *others])


def check_method(
    label: str, references: Sequence[Any], method: str, known: Collection[str]
) -> None:
    """Raises InputError for a way to place references that the model's forward does not know."""
    if references and method not in known:
        raise unsupported(label, "reference latents method", method, known)
