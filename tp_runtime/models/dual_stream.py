"""What the families with a stream of text and one of image tokens share (FLUX.1, Qwen-Image).

Patches, positions, references, joint attention, the loop over blocks with a ControlNet's residuals.
Their attention modules have diffusers' names; the arithmetic is ComfyUI's (0.3.75, comfy/ldm/flux/
and comfy/ldm/qwen_image/), whose order of operations shows in the last bits.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..errors import InputError
from ..gpu.epilogue import Epilogue, Product
from ..gpu.graphs import fused
from .forward import Conditioning, ShardedForward, option, unsupported
from .layers import Heads, project, rotated_heads
from .token_shares import TokenShares

NORM_EPS = 1e-6

# From normed tokens to the row-parallel linear that ends an MLP, with its input.
FeedForward = Callable[[torch.Tensor], Product]

# ComfyUI's name of the kind of a block, "double_block" or "single_block", and its number.
BlockName = tuple[str, int]

# --- blocks ------------------------------------------------------------------------------------


@fused
def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights of (B, L, D), then scaled and shifted by (B, D)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


def heads_of(qkv: torch.Tensor, norm_q: Any, norm_k: Any) -> Heads:
    """What ``rotated_heads`` takes, of (B, L, 3·N·K)."""
    head_dim = norm_q.weight.shape[0]
    return qkv.unflatten(-1, (-1, head_dim)), norm_q.weight, norm_k.weight


@dataclass(frozen=True)
class BlockInputs:
    """What every block of an evaluation is given beside its tokens. Text comes first.

    ``num_late``: the last tokens of the image that have a modulation of their own. ``shares``: if
    these are of this rank's tokens.
    """

    num_text: int
    rotation: torch.Tensor
    mask: torch.Tensor | None = None
    limit: bool = False
    num_late: int = 0
    shares: TokenShares | None = None

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of this rank's tokens to all: (B, L, N, K) of each → (B, L, N·K)."""
        assert self.shares is not None
        return self.shares.attention(q, k, v, self.mask)

    def of_rank(self, shares: TokenShares) -> "BlockInputs":
        """The same of this rank's tokens; ``shares``: of text, image and late tokens."""
        return replace(
            self,
            num_text=shares.own_length(0),
            rotation=shares.own_of_all(self.rotation),
            mask=shares.in_their_order(self.mask),
            num_late=shares.own_length(2),
            shares=shares,
        )


@dataclass(frozen=True)
class Block:
    """A block to evaluate. ``modulation`` (S, B, n, D): its own, the first norm's shift and scale
    first; of text, image and late tokens, or fewer where they are the same. ``parts``: from normed
    tokens to the row-parallel linears that end its attention and its MLP, or both at once; with
    each the index of its gate, and of the next norm's shift, if any.
    """

    name: BlockName
    modulation: torch.Tensor
    parts: tuple[tuple[Callable[[torch.Tensor, BlockInputs], list[Product]], int], ...]


def gelu_feed_forward(feed_forward: Any) -> FeedForward:
    """Of diffusers' ``FeedForward`` with GELU, by tanh."""
    up, down = feed_forward.net[0].proj, feed_forward.net[2]
    return lambda x: (down, project(up, x, gelu=True))


def dual_block(
    name: BlockName,
    modulation: torch.Tensor,
    attend: Any,
    feed_forwards: tuple[FeedForward, FeedForward],
) -> Block:
    """One with two streams, which meet in attention. ``feed_forwards``: of text and image."""

    def attended(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        text, image = normed[:, : given.num_text], normed[:, given.num_text :]
        added = project(attend.to_added_qkv, text)
        of_text = heads_of(added, attend.norm_added_q, attend.norm_added_k)
        of_image = heads_of(project(attend.to_qkv, image), attend.norm_q, attend.norm_k)
        q, k, v = rotated_heads([of_text, of_image], given.rotation, NORM_EPS)
        found = given.attention(q, k, v)
        text, image = found[:, : given.num_text], found[:, given.num_text :]
        return [(attend.to_add_out, text), (attend.to_out[0], image)]

    def mlp(normed: torch.Tensor, given: BlockInputs) -> list[Product]:
        streams = normed[:, : given.num_text], normed[:, given.num_text :]
        return [of(x) for of, x in zip(feed_forwards, streams, strict=True)]

    return Block(name, modulation, ((attended, 2), (mlp, 5)))


def run_blocks(
    forward: ShardedForward,
    blocks: Sequence[Block],
    text: torch.Tensor,
    image: torch.Tensor,
    last_norm: torch.Tensor,
    given: BlockInputs,
    skip: Collection[BlockName],
    control: Mapping[str, Any] | None,
    patches: "Sequence[BlockPatch]" = (),
) -> torch.Tensor:
    """The image's tokens (B, L, D) after all blocks that are not skipped, and the last norm.

    ``last_norm`` (1, B, 2, D): its shift and scale. Without its late tokens.
    """
    has_late, num_image = given.num_late > 0, image.shape[1] - given.num_late
    shares = forward.shares(given.num_text, num_image, given.num_late)
    image, late = image.split((num_image, given.num_late), dim=1)
    text, image, late = (shares.own(one, index) for index, one in enumerate((text, image, late)))
    given = given.of_rank(shares)
    patches = [one._replace(hint=shares.own(one.hint, 1)) for one in patches]
    residuals = _residuals_between(control, [block.name for block in blocks], skip, patches)
    blocks = [block for block in blocks if block.name not in skip]
    # Shift and scale of every block's first norm, and of the last norm.
    norms = [*(block.modulation[..., :2, :] for block in blocks), last_norm]
    tokens = torch.cat((text, image, late), dim=1)
    _add_residuals(tokens, residuals[0], shares)

    def first_norms(tokens: torch.Tensor, shift_and_scale: torch.Tensor) -> torch.Tensor:
        stretches = [shares.of_stream(tokens, stream) for stream in range(2 + has_late)]
        of_each = shift_and_scale.expand(len(stretches), -1, -1, -1).unbind(2)
        streams = [modulate(one, *of) for one, *of in zip(stretches, *of_each, strict=True)]
        return torch.cat(streams, dim=1)

    normed = first_norms(tokens, norms[0])
    for block, next_norm, of_control in zip(blocks, norms[1:], residuals[1:], strict=True):
        for part, gate in block.parts:
            products = part(normed, given)
            is_last = part is block.parts[-1][0]
            if is_last and not patches:  # the join after it only adds to the tokens
                _add_residuals(tokens, of_control, shares)
            num_streams = len(products) + has_late
            own = block.modulation[-num_streams:]  # all the same but for the late tokens'
            shift_and_scale = (
                next_norm[-num_streams:] if is_last else own[..., gate + 1 : gate + 3, :]
            )
            shift, scale = shift_and_scale.expand(num_streams, -1, -1, -1).unbind(2)
            epilogue = Epilogue(
                NORM_EPS,
                own[..., gate, :],
                "layer",
                scale,
                shift,
                limit=given.limit and is_last,
                num_late=given.num_late,
            )
            if is_last and patches:  # which look at the tokens that the block has made
                epilogue = epilogue._replace(norm="none", scale=None, shift=None)
                tokens = forward.join(products, tokens, epilogue)[1].clone()
                _add_residuals(tokens, of_control, shares)
                normed = first_norms(tokens, next_norm)
            else:
                tokens, normed = forward.join(products, tokens, epilogue)
    return shares.whole(shares.of_stream(normed, 1), 1)


def gathered_modulation(
    forward: ShardedForward, linears: Sequence[Any], activated: torch.Tensor, count: int
) -> torch.Tensor:
    """Column-parallel linears on (B, D), with one gather for all: (linears, B, count, D)."""
    width = forward.sizes.dim
    if not linears:
        return activated.new_empty(0, activated.shape[0], count, width)
    local = torch.stack([linear(activated) for linear in linears])
    whole = forward.collectives.gather(local)[..., : count * width]
    return whole.unflatten(-1, (count, width))


# --- patches and positions ---------------------------------------------------------------------


def pack_patches(x: torch.Tensor, patch: int = 2) -> torch.Tensor:
    """Square patches as tokens: (B, C, H, W) → (B, L, C·patch²), padded circularly."""
    x = F.pad(x, (0, -x.shape[-1] % patch, 0, -x.shape[-2] % patch), mode="circular")
    patches = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C h p w p
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_patches(tokens: torch.Tensor, height: int, width: int, patch: int = 2) -> torch.Tensor:
    """(B, L, C·patch²) → (B, C, height, width), the inverse of ``pack_patches``."""
    rows = -(-height // patch)
    patches = tokens.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, -1))  # B h w C p p
    x = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return x[:, :, :height, :width]


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
    size: tuple[int, int],
    along: Callable[[int, int], torch.Tensor],
    patch: int = 2,
    step: float = 1.0,
) -> list[torch.Tensor]:
    """Positions of reference latents beside an image of ``size`` (height, width).

    ``method`` is one of: ``"index"`` and ``"negative_index"``, one behind another, ``step``
    apart; ``"uxo"``, diagonally below the image; ``"offset"``, side by side on one plane.
    ``along(start, length)``: positions along an axis of the patches of so many latent rows.
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
            along((start + patch // 2) // patch, length)
            for start, length in ((top, rows), (left, columns))
        )
        found.append(grid_positions(index, y, x))
    return found


def check_method(
    label: str, references: Sequence[Any], method: str, known: Collection[str]
) -> None:
    """Raises InputError for a way to place references that the model's forward does not know."""
    if references and method not in known:
        raise unsupported(label, "reference latents method", method, known)


# --- ControlNets, and blocks that are left out ---------------------------------------------------

_RESIDUALS = {"double_block": "input", "single_block": "output"}  # ComfyUI's names, too


def skipped_blocks(transformer_options: Mapping[str, Any] | None) -> tuple[BlockName, ...]:
    """The blocks that a node has left out: ``skip_blocks`` of the options, by kind."""
    by_kind = option(transformer_options, "skip_blocks")
    return tuple((kind, index) for kind, indices in by_kind.items() for index in indices)


class BlockPatch(NamedTuple):
    """A model patch that is called after every double block.

    ``residual``: from the block's index, the tokens of the image that the hint is of, (B, L, D),
    and the hint (B or 1, L, D), to what is added to these tokens, multiplied by ``strength``.
    """

    residual: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
    hint: torch.Tensor
    strength: float


Residual = torch.Tensor | tuple[BlockPatch, int]  # a ControlNet's, or a patch's of that block


class DualStreamForward(ShardedForward):
    """A forward that takes a ControlNet's residuals for the tokens of its image, and patches."""

    def block_patches(self, listed: Sequence[Mapping[str, Any]]) -> list[BlockPatch]:
        """The model patches of an evaluation; ``listed``: see ``MODEL_PATCHES``."""
        return [
            BlockPatch(self.model_patches[one["name"]].residual, one["hint"], one["strength"])
            for one in listed
        ]

    def check_patches(self, batch: int, length: int, listed: Sequence[Mapping[str, Any]]) -> None:
        """Raises InputError for a hint of another shape than (batch or 1, up to length, width)."""
        for one in listed:
            shape, width = tuple(one["hint"].shape), self.sizes.dim
            if len(shape) != 3 or shape[0] not in (1, batch) or shape[2] != width:
                raise InputError(
                    f"The picture of a model patch has tokens of shape {shape}; {self.label} takes "
                    f"({batch}, {length}, {width}) here, or one for all items of the batch. Use as "
                    "many pictures as latents, or one, and a patch made for this model."
                )
            if shape[1] > length:
                raise InputError(
                    f"The picture of a model patch has {shape[1]} tokens; the latent has {length}."
                )

    def check_control(
        self, batch: int, conditioning: Conditioning, control: Mapping[str, Any]
    ) -> None:
        """Raises InputError."""
        label, width = self.label, self.sizes.dim
        length = conditioning["rotation"].shape[1] - conditioning["text"].shape[1]
        stacks = [control.get(name) or () for name in _RESIDUALS.values()]
        for residual in (item for stack in stacks for item in stack if item is not None):
            shape = tuple(residual.shape)
            fits = len(shape) == 3 and shape[0] in (1, batch) and shape[2] == width
            fits &= residual.is_floating_point()
            if not fits or shape[1] > length:
                raise InputError(
                    f"The ControlNet gives residuals of shape {shape}; {label} takes up to ({batch}"
                    f", {length}, {width}) here. Use a ControlNet made for {label}."
                )


def _residuals_between(
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
        stack = (control or {}).get(_RESIDUALS[kind]) or ()
        if index < len(stack) and stack[index] is not None:
            found[-1].append(stack[index])
    return found


def _add_residuals(
    tokens: torch.Tensor, residuals: Sequence[Residual], shares: TokenShares
) -> None:
    """Add residuals in place to the tokens behind the text's."""
    for residual in residuals:
        if isinstance(residual, tuple):
            patch, index = residual
            here = shares.of_stream(tokens, 1)[:, : patch.hint.shape[1]]
            here += patch.residual(index, here, patch.hint) * patch.strength
            continue
        of_image, of_late = residual.tensor_split([shares.lengths[1]], dim=1)
        for stream, one in ((1, of_image), (2, of_late)):
            own = shares.own(one, stream)
            shares.of_stream(tokens, stream)[:, : own.shape[1]] += own
