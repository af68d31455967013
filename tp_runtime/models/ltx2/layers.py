"""LTX-2's positions, rotary embedding and modulation: what its two streams are computed with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...gpu.graphs import fused
from ...sharding.plan import Split
from ..token_shares import TokenShares

EPS = 1e-6
QK_EPS = 1e-5
THETA = 10000.0  # ComfyUI's class passes no other on
SCALES = 8, 32, 32  # pixels of a latent along frames, rows and columns
HOP, SAMPLE_RATE = 160, 16000  # of sound: samples of a mel, and of a second
MELS_PER_LATENT = 4


@dataclass(frozen=True)
class Heads:
    """The heads of one attention: all ranks', and which of them this rank has."""

    split: Split
    rank: int
    tp_size: int

    def columns(self, per_head: int) -> tuple[slice, int]:
        """This rank's of an axis with ``per_head`` places for each head, and how many only pad."""
        split = Split(self.split.count, per_head)
        start, stop = split.range(self.rank, self.tp_size)
        return slice(start, stop), split.local(self.tp_size) - (stop - start)


def frequencies(width: int, num_axes: int, precision: str, device: torch.device) -> torch.Tensor:
    """(width // 2 // num_axes,) fp32, from 1 to theta times π/2.

    In fp64 before they are rounded, or in fp32, whose other last bits show.
    """
    count = width // (2 * num_axes)
    dtype = torch.float64 if precision == "float64" else torch.float32
    steps = torch.linspace(0.0, 1.0, count, dtype=dtype, device=device)
    powers = THETA**steps
    if dtype == torch.float64:
        return (powers * math.pi / 2).float()
    return powers * math.pi / 2


def rotation_of(
    positions: torch.Tensor,
    max_positions: Sequence[float],
    heads: Heads,
    precision: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Cosine and sine of this rank's heads: (B, axes, L) fp32 → (B, L, N, K/2, 2).

    Frequencies are laid out over the width of all heads, so that each head has its own: behind
    those that are left over, which turn nothing, the axes take turns.
    """
    num_axes = positions.shape[1]
    fractions = torch.stack(
        [positions[:, axis] / max_positions[axis] for axis in range(num_axes)], dim=-1
    )
    head_dim = heads.split.unit
    grid = frequencies(heads.split.full, num_axes, precision, positions.device)
    own, num_padding = heads.columns(head_dim // 2)
    left_over = heads.split.full // 2 - num_axes * len(grid)
    first, last = (max(0, place - left_over) for place in (own.start, own.stop))
    num_still = own.stop - own.start - (last - first)
    turning = torch.arange(first, last, device=positions.device)
    angles = grid[turning // num_axes] * (fractions[..., turning % num_axes] * 2 - 1)
    angles = F.pad(angles, (num_still, num_padding))
    found = torch.stack((angles.cos(), angles.sin()), dim=-1).to(dtype)
    return found.unflatten(2, (-1, head_dim // 2))


def video_positions(size: Sequence[int], causal: bool, device: torch.device) -> torch.Tensor:
    """First and last pixel of every latent along frames, rows and columns: (1, 3, L, 2) int64."""
    lines = [torch.arange(length, device=device) for length in size]
    starts = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)
    ends = torch.stack((starts, starts + 1), dim=-1)
    pixels = ends * torch.tensor(SCALES, device=device)[:, None, None]
    if causal:  # the first latent is one picture
        pixels[0] = (pixels[0] + 1 - SCALES[0]).clamp(min=0)
    return pixels[None]


def audio_positions(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Seconds at which latents of sound begin and end: (1, 1, stop - start, 2) fp32."""

    def seconds(first: int, last: int) -> torch.Tensor:
        latents = torch.arange(first, last, dtype=torch.float32, device=device)
        mels = (latents * MELS_PER_LATENT + 1 - MELS_PER_LATENT).clip(min=0)
        return mels * HOP / SAMPLE_RATE

    return torch.stack((seconds(start, stop), seconds(start + 1, stop + 1)), dim=-1)[None, None]


def reference_positions(length: int, device: torch.device) -> torch.Tensor:
    """Of ``length`` latents of sound that end just before the first: (1, 1, length, 2)."""
    places = audio_positions(0, length, device)
    return places - (places[0, 0, -1, 1].item() + HOP * MELS_PER_LATENT / SAMPLE_RATE)


def middle_of(positions: torch.Tensor, middle: bool = True) -> torch.Tensor:
    """(..., 2) → (...): where it is in between, or begins."""
    return (positions[..., 0] + positions[..., 1]) / 2.0 if middle else positions[..., 0]


def row_of(
    table: torch.Tensor,
    of_time: torch.Tensor,
    index: int,
    repeats: int = 1,
    shares: TokenShares | None = None,
) -> torch.Tensor:
    """Row ``index`` of a block's table (n, D) and of (B, F, n, D) of F timesteps, as joins take it.

    (1, B, D) of one timestep; (1, B, L, D) of several, each of ``repeats`` tokens. Where that is
    more than one token, of this rank's in ``shares``.
    """
    row = table[index] + of_time[:, :, index]
    if row.shape[1] == 1:
        return row[:, 0][None]
    if repeats > 1:
        row = row.repeat_interleave(repeats, dim=1)
        row = row if shares is None else shares.own(row)
    return row[None]


@fused
def modulated(normed: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """(B, L, D), by rows as ``row_of`` makes them."""
    scale, shift = (row[0] if row.ndim == 4 else row[0][:, None] for row in (scale, shift))
    return normed * (1 + scale) + shift


@fused
def gated_heads(attended: torch.Tensor, logits: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Each head of (B, L, N·K) times its gate, of (B, L, N)."""
    heads = attended.unflatten(-1, (-1, head_dim))
    return (heads * (2.0 * torch.sigmoid(logits))[..., None]).flatten(2)
