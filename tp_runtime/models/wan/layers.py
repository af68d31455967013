"""Wan's tokens, positions and timesteps, and what models of it have beside their blocks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ...gpu.epilogue import Epilogue
from ..rows import TIME_CHANNELS
from ..token_shares import TokenShares
from .family import CAMERA_DOWNSCALE, FAMILY, WanSizes
from .rows import PATCH

EPS = 1e-6
CLIP_EPS = 1e-5
BESIDE = 120.0  # rows or columns to what lies beside a video
Pair = tuple[torch.Tensor, torch.Tensor]  # keys, and values (B, L, N, K)
AXES = (("scale_t", "shift_t"), ("scale_y", "shift_y"), ("scale_x", "shift_x"))


def padded(x: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, T, H, W) of a whole number of patches, padded circularly."""
    rows, columns = x.shape[-2:]
    return F.pad(x, (0, -columns % PATCH[2], 0, -rows % PATCH[1], 0, 0), mode="circular")


def as_tokens(embedded: torch.Tensor) -> torch.Tensor:
    """(B, D, ...) → (B, L, D)."""
    return embedded.flatten(2).transpose(1, 2)


def unpatchified(tokens: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """(B, L, 4·C) → (B, C, T, H, W). Features are in the order of row, column, channel."""
    count = math.prod(grid)
    patches = tokens[:, :count].unflatten(2, (*PATCH[1:], -1)).unflatten(1, tuple(grid))
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)  # B C f h p w q


def sinusoids(times: torch.Tensor) -> torch.Tensor:
    """(n,) → (n, 256), cosines first. Frequencies are powers, as ComfyUI's: last bits show."""
    half = TIME_CHANNELS // 2
    steps = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = torch.outer(times.float(), torch.pow(10000, -steps / half))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class Rows(NamedTuple):
    """What scales, shifts and gates tokens: rows (F, B, D) of each of F timesteps; or none.

    ``frames`` (l,) int64: of this rank's tokens, the frame whose timestep each has; None: F is 1.
    """

    values: Sequence[torch.Tensor] = ()
    frames: torch.Tensor | None = None


def rows_of(table: torch.Tensor, of_time: torch.Tensor, frames: torch.Tensor | None) -> Rows:
    """A block's table (1, n, D) plus (B, F, n or 1, D) of F timesteps: n rows."""
    return Rows((table[None] + of_time).transpose(0, 1).unbind(2), frames)


def frames_of(shares: TokenShares, timesteps: torch.Tensor) -> torch.Tensor | None:
    """Of this rank's tokens the frame (l,) of each; None where ``timesteps`` are (B,) or (B, 1)."""
    if timesteps.ndim == 1 or timesteps.shape[1] == 1:
        return None
    num_tokens = shares.lengths[0]
    per_frame = -(-num_tokens // timesteps.shape[1])
    frames = torch.arange(num_tokens, device=timesteps.device) // per_frame
    return shares.own(frames[None])[0]


def by_block(
    keys: torch.Tensor,
    values: torch.Tensor,
    picture_keys: torch.Tensor | None = None,
    picture_values: torch.Tensor | None = None,
) -> list[list[Pair]]:
    """For each block what it looks at beside its tokens, of (blocks, B, L, N, K) each."""
    found = [[pair] for pair in zip(keys, values, strict=True)]
    if picture_keys is not None and picture_values is not None:
        for here, pair in zip(found, zip(picture_keys, picture_values, strict=True), strict=True):
            here.append(pair)
    return found


def positions_of(
    size: tuple[int, ...], options: Mapping[str, float], x: torch.Tensor
) -> torch.Tensor:
    """Positions (L, 3) of tokens by frame, row and column, rounded to the dtype of ``x``."""
    lines = []
    for length, patch, (scale, shift) in zip(size, PATCH, AXES, strict=True):
        steps = -(-length // patch)
        start = options.get(shift, 0.0)
        stop = start + (steps - 1.0) * options.get(scale, 1.0)
        lines.append(torch.linspace(start, stop, steps, dtype=x.dtype, device=x.device).float())
    return torch.cartesian_prod(*lines)


def positions_with_poses(
    size: tuple[int, int, int],
    pictures: int,
    poses: tuple[int, ...] | None,
    replaces: bool,
    options: Mapping[str, float],
    x: torch.Tensor,
) -> list[torch.Tensor]:
    """Positions of SCAIL's tokens: of ``pictures`` and a video of ``size`` frames, rows and
    columns, and of a video of ``poses``, beside it. ``replaces`` people in the video: then pictures
    lie below it, and else before it.
    """
    frames, *sides = size
    if replaces:
        start = max(pictures - 1, 0)
        later = {**options, "shift_t": options.get("shift_t", 0.0) + start}
        found = [positions_of((pictures, *sides), {"shift_y": BESIDE}, x)] if pictures else []
        found.append(positions_of((frames, *sides), later, x))
    else:
        start = pictures
        found = [positions_of((pictures + frames, *sides), options, x)]
    if poses is not None:
        # Spread over the size of the video, each in the middle of what it stands for.
        rows, columns = (side / of_poses for side, of_poses in zip(sides, poses[1:], strict=True))
        beside = {"scale_y": rows, "scale_x": columns, "shift_t": start}
        beside |= {"shift_y": (rows - 1) / 2, "shift_x": BESIDE + (columns - 1) / 2}
        found.append(positions_of(poses, beside, x))
    return found


def before_block(rows: Rows, gate: torch.Tensor | None = None) -> Epilogue:
    """Normed as the block that the rows are of begins; without rows: normed only."""
    shift, scale = rows.values[:2] or (None, None)
    return Epilogue(EPS, gate, "layer", scale, shift, streams=rows.frames)


def embedded_picture(embedder: Any, features: torch.Tensor) -> torch.Tensor:
    """CLIP's features (B, n, C) as the blocks look at them (B, n, D)."""
    places = embedder.pos_embed
    if places is not None:
        features = features[:, : places.shape[1]] + places[:, : features.shape[1]]

    def normed(norm: Any, y: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(y, norm.weight.shape, norm.weight, norm.bias, CLIP_EPS)

    up, down = embedder.ff.net[0].proj, embedder.ff.net[2]
    return normed(embedder.norm2, down(F.gelu(up(normed(embedder.norm1, features)))))


def check_length(
    what: str, given: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
) -> None:
    """Raises InputError unless what goes with the video is as many tokens as the video."""
    if tokens.shape[1] != len(positions):
        raise InputError(
            f"{what} of {FAMILY.label} must have the frames and the size of the video: of the "
            f"shape {tuple(given.shape)} they are {tokens.shape[1]} tokens, the video is "
            f"{len(positions)}. Give both the same length, width and height, multiples of 16."
        )


class CameraAdapter(nn.Module):
    """From a camera's path (B, C, T, H, W) in pixels to what is added to tokens (B, D, T, h, w)."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        kernel = PATCH[1:]
        self.conv = nn.Conv2d(channels * CAMERA_DOWNSCALE**2, dim, kernel, kernel)
        convolutions = {name: nn.Conv2d(dim, dim, 3, padding=1) for name in ("conv1", "conv2")}
        self.residual_block = nn.ModuleDict(convolutions)

    def forward(self, path: torch.Tensor) -> torch.Tensor:
        frames = path.transpose(1, 2).flatten(0, 1)
        found = self.conv(F.pixel_unshuffle(frames, CAMERA_DOWNSCALE))
        block = self.residual_block
        found = found + block["conv2"](F.relu(block["conv1"](found)))
        return found.unflatten(0, (path.shape[0], -1)).transpose(1, 2)


def with_variants(module: nn.Module, sizes: WanSizes) -> nn.Module:
    """diffusers' module with what variants of the model have beside it."""
    dim, kernel = sizes.dim, PATCH[1:]
    if sizes.reference_channels:
        module.ref_conv = nn.Conv2d(sizes.reference_channels, dim, kernel, kernel)
    for name, channels in (("pose", sizes.pose_channels), ("mask", sizes.mask_channels)):
        if channels:
            setattr(module, f"patch_embedding_{name}", nn.Conv3d(channels, dim, PATCH, PATCH))
    if sizes.camera_channels:
        module.control_adapter = CameraAdapter(sizes.camera_channels, dim)
    if sizes.vace_channels:
        from diffusers.models.transformers.transformer_wan_vace import WanVACETransformerBlock

        module.vace_patch_embedding = nn.Conv3d(sizes.vace_channels, dim, PATCH, PATCH)
        module.vace_blocks = nn.ModuleList(
            WanVACETransformerBlock(
                dim,
                sizes.mlp_dim,
                sizes.num_heads,
                cross_attn_norm=True,
                apply_input_projection=index == 0,
                apply_output_projection=True,
            )
            for index in range(sizes.vace_blocks)
        )
    return module
