"""MiniMax H3's tokens and their places, and layers in fp32.

Places follow ``PackedLayout`` (ComfyUI 0.33, comfy/ldm/minimax/model.py): of the text in a row,
then keyframes or references, then the sound and the video that are made.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .payload import FRAMES_OF_LATENTS, PATCH, SIDES

FRAME = 5 / 3  # how far apart frames lie, in samples of sound
PICTURE = 32.0  # how wide and high a square picture is
VIDEO, TEXT, AUDIO = range(3)  # modalities


class ExactLinear(nn.Module):
    """A linear that is held and computed in fp32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) → (..., out_features) fp32."""
        return F.linear(x.float(), self.weight, self.bias)


class Frequencies(nn.Module):
    """Those of the rotary embedding, which are the file's."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.inv_freq = nn.Parameter(torch.empty(count), requires_grad=False)


class Segment(NamedTuple):
    """Tokens of a condition: their ``places`` (L, 3) fp64 in time, row and column."""

    modality: int
    places: torch.Tensor


class Layout(NamedTuple):
    """``places`` (L, 3) of all tokens; ``conditions``, in their order."""

    places: torch.Tensor
    conditions: list[Segment]


def layout_of(
    num_text: int, video: Sequence[int], num_samples: int, payload: Mapping[str, Any]
) -> Layout:
    """Where every token lies. ``video``: latents, rows and columns, whole patches.

    ``payload``: as ``payload.prepared`` gives it.
    """
    num_latents, *size = video
    picture = _of_picture(*size)
    sides = _sides(picture)
    begin = float(num_text)
    end = begin + sum(_length(reference) for reference in payload["refs"])
    conditions = []
    for frame, latents, samples in payload["keyframes"]:
        at = end + FRAME * frame
        if latents:
            conditions.append(Segment(VIDEO, _of_video(at, latents, picture)))
        if samples:
            conditions.append(Segment(AUDIO, _of_audio(at, samples, sides)))
    at = begin
    for reference in payload["refs"]:
        kind, rows, columns, latents, samples = reference
        own = picture if kind == "audio" else _of_picture(rows, columns)
        if samples:
            conditions.append(Segment(AUDIO, _of_audio(at, samples, _sides(own))))
        if latents:
            conditions.append(Segment(VIDEO, _of_video(at, latents, own)))
        at += _length(reference)
    text = torch.zeros(num_text, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(num_text)
    targets = _of_audio(end, num_samples, sides), _of_video(end, num_latents, picture)
    places = torch.cat((text, *(segment.places for segment in conditions), *targets))
    return Layout(places, conditions)


def _length(reference: Sequence[Any]) -> float:
    """How much time a reference takes."""
    kind, _, _, latents, samples = reference
    if kind == "image":
        return 1.0
    return max(float(samples), sum(_spans(latents)))


def _spans(latents: int) -> list[float]:
    return [FRAME * FRAMES_OF_LATENTS[i % len(FRAMES_OF_LATENTS)] for i in range(latents)]


def _of_picture(rows: int, columns: int) -> torch.Tensor:
    """(rows, columns, 2) of patches: around the middle, as if the area were a square's."""
    side = math.sqrt(rows * columns)

    def line(length: int, patch: int) -> torch.Tensor:
        share, count = length / side, length // patch
        steps = torch.arange(count, dtype=torch.float64) * (share / count)
        return (steps + (1.0 - share) / 2.0) * PICTURE

    grid = torch.meshgrid(line(rows, PATCH[1]), line(columns, PATCH[2]), indexing="ij")
    return torch.stack(grid, dim=-1)


def _sides(picture: torch.Tensor) -> tuple[float, float]:
    """The columns where sound comes from: the first and the last."""
    return float(picture[0, 0, 1]), float(picture[0, -1, 1])


def _of_video(begin: float, latents: int, picture: torch.Tensor) -> torch.Tensor:
    spans = torch.tensor(_spans(latents), dtype=torch.float64)
    times = begin + F.pad(spans[:-1].cumsum(0), (1, 0))
    flat = picture.flatten(0, 1)
    found = torch.empty(latents, len(flat), 3, dtype=torch.float64)
    found[..., 0] = times[:, None]
    found[..., 1:] = flat
    return found.flatten(0, 1)


def _of_audio(begin: float, samples: int, sides: tuple[float, float]) -> torch.Tensor:
    found = torch.zeros(SIDES, samples, 3, dtype=torch.float64)
    found[..., 0] = begin + torch.arange(samples, dtype=torch.float64)
    found[..., 2] = torch.tensor(sides, dtype=torch.float64)[:, None]
    return found.flatten(0, 1)


def patchified(video: torch.Tensor) -> torch.Tensor:
    """(1, C, T, H, W) → (L, 4·C) fp32. Features in the order of channel, row, column."""
    patches = video[0].float().unflatten(3, (-1, PATCH[2])).unflatten(2, (-1, PATCH[1]))
    return patches.permute(1, 2, 4, 0, 3, 5).flatten(3).flatten(0, 2)  # C t h p w q


def unpatchified(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """(L, 4·C) → (1, C, T, H, W)."""
    patches = tokens.unflatten(1, (-1, *PATCH[1:])).unflatten(0, tuple(grid))
    return patches.permute(3, 0, 1, 4, 2, 5).flatten(4).flatten(2, 3)[None]  # t h w C p q


def packed(audio: torch.Tensor) -> torch.Tensor:
    """(1, C, 2, T) → (2·T, C) fp32: one side, then the other."""
    return audio[0].float().permute(1, 2, 0).flatten(0, 1)


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    """(2·T, C) → (1, C, 2, T)."""
    return tokens.unflatten(0, (SIDES, -1)).permute(2, 0, 1)[None]


def with_noise(rows: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    """A condition with a little noise, which is the same for each and on every machine."""
    if share >= 1.0:
        return rows
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(rows.shape, generator=generator)
    return share * rows + (1.0 - share) * noise.to(rows.device)
