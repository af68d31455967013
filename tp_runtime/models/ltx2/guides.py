"""LTX-2's guides: tokens behind a video's own, at places of their own, that it looks at."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...errors import InputError
from ..layers import attention
from .family import FAMILY, LTX2Sizes
from .layers import video_positions


class Tokens(NamedTuple):
    """Those of a video's latents that are computed with.

    ``pixels`` (B or 1, 3, L, 2) int64: first and last pixel along frames, rows and columns. The
    last ``num_guides`` are guides. ``left``, of all latents, and ``guides_left``, of the guides:
    whether one is among them.
    """

    pixels: torch.Tensor
    num_guides: int
    left: torch.Tensor
    guides_left: torch.Tensor


def tokens_of(
    size: Sequence[int],
    causal: bool,
    places: torch.Tensor | None,
    mask: torch.Tensor | None,
    device: torch.device,
) -> Tokens:
    """Of latents of ``size`` frames, rows and columns. ``places`` (B, 3, n, 2): where the last n
    are, which are guides; ``mask`` (B, C, *size): below zero where there is no token.

    Raises:
        InputError: guides that are no frames of the video, or without a mask.
    """
    pixels = video_positions(size, causal, device)
    left = torch.ones(pixels.shape[2], dtype=torch.bool, device=device)
    if places is None:
        return Tokens(pixels, 0, left, left[:0])
    if mask is None:
        raise InputError(
            f"Guides of {FAMILY.label} need the mask that 'LTXVAddGuide' puts into the latent. "
            "Give its latent to the sampler, together with its conditioning."
        )
    per_frame, count = math.prod(size[1:]), places.shape[2]
    if count % per_frame or count > math.prod(size):
        raise InputError(
            f"The guides of {FAMILY.label} are {count} tokens; they must be whole frames of "
            f"{per_frame} tokens here, at most {size[0]}. They were made for a video of another "
            "size: crop guides ('LTXVCropGuides') before the latent is made larger."
        )
    left = ~(mask.flatten(2) < 0).any(dim=1)[0]
    guides_left = left[-count:]
    kept = places[:, :, guides_left].long()  # whole pixels, as ComfyUI has them
    num_guides = kept.shape[2]
    own = pixels[:, :, left][:, :, : int(left.sum()) - num_guides]
    pixels = torch.cat((own.expand(len(kept), -1, -1, -1), kept), dim=2)
    return Tokens(pixels, num_guides, left, guides_left)


def check_plain(sizes: LTX2Sizes, frame_rate: Any, reference: Any, blocks: Any) -> None:
    """Raises InputError unless inputs that are no tensors are what they should be.

    ``reference``: sound that goes before, in a dictionary. ``blocks``: numbers of some.
    """
    label, channels = FAMILY.label, sizes.audio_channels
    if isinstance(frame_rate, bool) or not isinstance(frame_rate, int | float) or frame_rate <= 0:
        raise InputError(
            f"The frame rate of {label} must be a number above 0; got {frame_rate!r:.80}. Set it "
            "with 'LTXVConditioning'."
        )
    sound = reference.get("tokens") if isinstance(reference, Mapping) else None
    fits = isinstance(sound, torch.Tensor) and sound.ndim == 3 and sound.shape[2] == channels
    if reference is not None and not fits:
        got = tuple(sound.shape) if isinstance(sound, torch.Tensor) else type(sound).__name__
        raise InputError(
            f"Reference sound of {label} has the shape (batch, tokens, {channels}); got {got}. Set "
            "it with 'LTXVReferenceAudio'."
        )
    if blocks is not None and not isinstance(blocks, list | tuple):
        raise InputError(
            f"Perturbed blocks of {label} must be a list; got {blocks!r:.80}. Remove the node that "
            "sets them."
        )


def varies_in_a_frame(mask: torch.Tensor | None) -> bool:
    """Whether a mask (B, C, T, H, W) has more than one value in a frame of its first item."""
    if mask is None:
        return False
    frames = mask[0, 0].flatten(1)
    return bool((frames.amin(dim=1) != frames.amax(dim=1)).any())


def single_pictures(
    tokens: Tokens, size: Sequence[int], generated: Mapping[str, int] | None
) -> torch.Tensor:
    """Which tokens are of one picture, (B or 1, L) bool: the first, and those that the model makes.

    Raises:
        InputError: ``generated`` were asked for at another size.
    """
    chosen = torch.zeros_like(tokens.left)
    if generated is not None:
        per_frame, asked = math.prod(size[1:]), generated.get("tokens_per_frame")
        if asked != per_frame:
            raise InputError(
                f"Generated keyframes of {FAMILY.label} were made for frames of {asked} tokens; "
                f"those of this latent are {per_frame}. Separate them before the latent is made "
                "larger."
            )
        first = generated["first_latent_frame"] * per_frame
        chosen[first : first + generated["num_keyframes"] * per_frame] = True
    at_start = tokens.pixels[:, 0, :, 0] == 0
    at_start[:, at_start.shape[1] - tokens.num_guides :] = False
    return at_start | chosen[tokens.left]


class Guides(NamedTuple):
    """Tokens from ``start`` on that are attended to more or less than others, and how much.

    ``to_them`` (1, 1, 1, L) is added to the scores of the tokens before them, ``from_them``
    (1, 1, n, L) to those of their own.
    """

    start: int
    to_them: torch.Tensor
    from_them: torch.Tensor


def looked_at(
    entries: Sequence[Mapping[str, Any]], tokens: Tokens, like: torch.Tensor
) -> Guides | None:
    """How much guides are looked at; None if as much as all else, or if there are none. ``like``
    has the dtype.

    ``entries``, of one guide each: the tokens that it had (``pre_filter_count``), its ``strength``,
    and ``pixel_mask`` (B, 1, frames, height, width) with ``latent_shape``, if there is one.

    Raises:
        InputError: they are not those of the guides.
    """
    left = tokens.guides_left
    if not entries or not len(left):
        return None
    for entry in entries:
        _check_entry(entry)
    counts = [entry["pre_filter_count"] for entry in entries]
    if sum(counts) != len(left):
        raise InputError(
            f"The guides of {FAMILY.label} are {len(left)} tokens, but {sum(counts)} by what was "
            "said of how much to look at them. Add every guide with 'LTXVAddGuide'."
        )
    each = zip(entries, left.split(counts), strict=True)
    weights = torch.cat([_weights(entry, int(own.sum()), like) for entry, own in each])
    if bool(weights.eq(1).all()):
        return None
    num_tokens = tokens.pixels.shape[2]
    start = num_tokens - tokens.num_guides
    limits = torch.finfo(weights.dtype)
    logarithms = torch.where(
        weights > 0, weights.clamp(min=limits.tiny).log(), torch.full_like(weights, limits.min)
    )
    to_them = weights.new_zeros(1, 1, 1, num_tokens)
    to_them[..., start : start + len(weights)] = logarithms
    from_them = weights.new_zeros(1, 1, len(weights), num_tokens)
    from_them[..., :start] = logarithms[:, None]
    return Guides(start, to_them, from_them)


def guided_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, guides: Guides
) -> torch.Tensor:
    """Attention with ``guides``, without a mask of all tokens by all tokens."""
    stop = guides.start + guides.from_them.shape[2]
    parts = [
        attention(q[:, : guides.start], k, v, guides.to_them),
        attention(q[:, guides.start : stop], k, v, guides.from_them),
    ]
    if stop < q.shape[1]:
        parts.append(attention(q[:, stop:], k, v))
    return torch.cat(parts, dim=1)


def _check_entry(entry: Any) -> None:
    """Raises InputError for what does not say how much a guide is looked at."""

    def fits(name: str, kind: Any) -> bool:
        return isinstance(entry.get(name), kind)

    known = isinstance(entry, Mapping) and fits("pre_filter_count", int)
    known = known and fits("strength", int | float)
    if known and entry.get("pixel_mask") is not None:
        shape = entry.get("latent_shape")
        known = isinstance(entry["pixel_mask"], torch.Tensor) and entry["pixel_mask"].ndim == 5
        sized = isinstance(shape, list | tuple) and len(shape) == 3
        known = known and (shape is None or (sized and all(length > 0 for length in shape)))
    if not known:
        raise InputError(
            f"What {FAMILY.label} was told of a guide is no number of tokens with a strength, or "
            "its mask is none of pictures. Add every guide with 'LTXVAddGuide'."
        )


def _weights(entry: Mapping[str, Any], surviving: int, like: torch.Tensor) -> torch.Tensor:
    """What a guide's tokens, of which so many are left, weigh: (n,)."""
    mask, shape = entry.get("pixel_mask"), entry.get("latent_shape")
    if mask is None or shape is None:
        return like.new_full((surviving,), entry["strength"])
    of_latents = _mask_of_latents(mask[:1].to(like), *shape)
    return of_latents.flatten()[:surviving] * entry["strength"]


def _mask_of_latents(mask: torch.Tensor, frames: int, height: int, width: int) -> torch.Tensor:
    """(1, 1, F, H, W) in pixels → (frames, height, width): means of what a latent stands for."""
    small = F.interpolate(mask[0].transpose(0, 1), size=(height, width), mode="area")[:, 0]
    first, rest = small[:1], small[1:]
    if frames <= 1:
        return first
    if not len(rest):
        return first.expand(frames, -1, -1)
    each = len(rest) // (frames - 1)
    if each:
        rest = rest[: each * (frames - 1)].unflatten(0, (-1, each)).mean(dim=1)
    else:  # fewer pictures than latents
        lines = rest.flatten(1).T[None]
        rest = F.interpolate(lines, size=frames - 1, mode="nearest")[0].T
        rest = rest.unflatten(1, (height, width))
    return torch.cat((first, rest))
