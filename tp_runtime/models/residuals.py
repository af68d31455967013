"""What is added to an image's tokens between blocks: ControlNets' residuals, and model patches."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from .forward import BlockName
from .token_shares import TokenShares

_STACKS = {"double_block": "input", "single_block": "output"}  # ComfyUI's names, too


class BlockPatch(NamedTuple):
    """A model patch that is called after every double block.

    ``residual``: from the block's index, the tokens of the image that the hint is of, (B, L, D),
    and the hint (B or 1, L, D), to what is added to these tokens, multiplied by ``strength``.
    """

    residual: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    hint: torch.Tensor
    strength: float


Residual = torch.Tensor | tuple[BlockPatch, int]  # a ControlNet's, or a patch's of that block


def residuals_between(
    control: Mapping[str, Any] | None,
    blocks: Sequence[BlockName],
    skip: Collection[BlockName],
    patches: Sequence[BlockPatch],
) -> list[list[Residual]]:
    """What is added to the image's tokens before the first block that is not skipped, after it,
    after the second, and so on: by patches, then by a ControlNet. A skipped block's residuals are
    added all the same.
    """
    found: list[list[Residual]] = [[]]
    for kind, index in blocks:
        if (kind, index) not in skip:
            found.append([])
        if kind == "double_block":
            found[-1] += [(patch, index) for patch in patches]
        stack = (control or {}).get(_STACKS[kind]) or ()
        if index < len(stack) and stack[index] is not None:
            found[-1].append(stack[index])
    return found


def add_residuals(tokens: torch.Tensor, residuals: Sequence[Residual], shares: TokenShares) -> None:
    """Add residuals in place to the tokens behind the text's, the first of the streams."""
    for residual in residuals:
        if isinstance(residual, tuple):
            patch, index = residual
            here = shares.of_stream(tokens, 1)[:, : patch.hint.shape[1]]
            here += patch.residual(index, here, patch.hint) * patch.strength
            continue
        of_image, of_late = residual.tensor_split([shares.lengths[1]], dim=1)
        for stream, one in ((1, of_image), (2, of_late)):
            own = shares.own_of(one, stream)
            shares.of_stream(tokens, stream)[:, : own.shape[1]] += own


def check_control(
    label: str, control: Mapping[str, Any], batch: int, length: int, width: int
) -> None:
    """Raises InputError for a residual that does not fit ``length`` tokens, or fewer."""
    stacks = [control.get(name) or () for name in _STACKS.values()]
    for residual in (item for stack in stacks for item in stack if item is not None):
        shape = tuple(residual.shape)
        fits = len(shape) == 3 and shape[0] in (1, batch) and shape[2] == width
        fits &= residual.is_floating_point()
        if not fits or shape[1] > length:
            raise InputError(
                f"The ControlNet gives residuals of shape {shape}; {label} takes up to ({batch}, "
                f"{length}, {width}) here. Use a ControlNet made for {label}."
            )


def check_hint(label: str, hint: torch.Tensor, batch: int, length: int, width: int) -> None:
    """Raises InputError for a hint of another shape than (batch or 1, up to length, width)."""
    shape = tuple(hint.shape)
    if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != width:
        raise InputError(
            f"The picture of a model patch has tokens of shape {shape}; {label} takes ({batch}, "
            f"{length}, {width}) here, or one for all items of the batch. Use as many pictures as "
            "latents, or one, and a patch made for this model."
        )
    if shape[1] > length:
        raise InputError(
            f"The picture of a model patch has {shape[1]} tokens; the latent has {length}. Give it "
            "a picture of the size that is sampled."
        )
