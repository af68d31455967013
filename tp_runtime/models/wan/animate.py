"""How Wan Animate looks at poses and faces: ComfyUI's ``AnimateWanModel`` (0.3.75,
comfy/ldm/wan/model_animate.py).

What is made of both is constant over a generation: ``condition`` makes it once, on every rank, but
for the keys and values of faces, of which each has its heads.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...errors import InputError
from ...gpu.epilogue import Product
from ..layers import attention, rms_norm
from ..token_shares import TokenShares
from .family import FAMILY, WanSizes
from .layers import EPS, Pair
from .rows import BLOCKS_PER_FACES, DIRECTIONS, MOTION, PATCH, POSE_CHANNELS, WIDTHS

_AT_ONCE = 8  # pictures of faces that are encoded at once
_SLOPE, _GAIN = 0.2, math.sqrt(2)
_BLUR = (1.0, 3.0, 3.0, 1.0)  # along rows, and along columns


class _ScaledConv(nn.Module):
    """A convolution whose weights are scaled by their number, of (B, C, H, W).

    ``halves``: sides are blurred, and halved. ``activated``: a leaky ReLU follows, with the bias.
    """

    def __init__(
        self, inputs: int, outputs: int, side: int, *, halves: bool = False, activated: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, side, side))
        self.bias = nn.Parameter(torch.empty(1, outputs, 1, 1)) if activated else None
        self._halves = halves

    def forward(self, x: torch.Tensor, padding: int = 0) -> torch.Tensor:
        stride = 1
        if self._halves:
            padding, stride = 0, 2
            x = _blurred(x, self.weight.shape[-1])
        scale = 1 / math.sqrt(self.weight[0].numel())
        x = F.conv2d(x, self.weight * scale, stride=stride, padding=padding)
        return x if self.bias is None else F.leaky_relu(x + self.bias, _SLOPE) * _GAIN


def _blurred(x: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, H, W), padded so that a convolution of that side then halves it."""
    line = torch.tensor(_BLUR, dtype=x.dtype, device=x.device) / sum(_BLUR)
    kernel = torch.outer(line, line)[None, None]
    blurred = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=(side + 1) // 2)
    return blurred.unflatten(0, x.shape[:2])[:, :, 0]


class _HalvingBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.same = _ScaledConv(inputs, inputs, 3)
        self.halved = _ScaledConv(inputs, outputs, 3, halves=True)
        self.skip = _ScaledConv(inputs, outputs, 1, halves=True, activated=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.halved(self.same(x, padding=1)) + self.skip(x)) / math.sqrt(2)


class MotionEncoder(nn.Module):
    """From pictures of faces (B, 3, 512, 512), of -1 to 1, to what they express (B, 512)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _ScaledConv(3, WIDTHS[0], 1)
        self.blocks = nn.ModuleList(_HalvingBlock(*pair) for pair in pairwise(WIDTHS))
        self.last = _ScaledConv(WIDTHS[-1], MOTION, 4, activated=False)
        outputs = (*4 * (MOTION,), DIRECTIONS)
        self.linears = nn.ModuleList(_ScaledLinear(MOTION, count) for count in outputs)
        self.directions = nn.Parameter(torch.empty(MOTION, DIRECTIONS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.first(pictures)
        for block in self.blocks:
            x = block(x)
        x = self.last(x).flatten(1)
        for linear in self.linears:
            x = linear(x)
        near_zero = 1e-8 * torch.eye(MOTION, DIRECTIONS, dtype=x.dtype, device=x.device)
        orthogonal, _ = torch.linalg.qr((self.directions + near_zero).float())
        return torch.sum(x[..., None] * orthogonal.T.to(x.dtype), dim=1)


class _ScaledLinear(nn.Module):
    # No ``nn.Linear``: every rank has all of it.
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1 / math.sqrt(self.weight.shape[1])
        return F.linear(x, self.weight * scale, self.bias)


def add_to(module: nn.Module, sizes: WanSizes) -> None:
    """Give diffusers' module what Wan Animate has beside its blocks."""
    from diffusers.models.transformers import transformer_wan_animate as of_diffusers

    module.pose_patch_embedding = nn.Conv3d(POSE_CHANNELS, sizes.dim, PATCH, PATCH)
    module.motion_encoder = MotionEncoder()
    module.face_encoder = of_diffusers.WanAnimateFaceEncoder(MOTION, sizes.dim)
    heads = sizes.dim, sizes.num_heads, sizes.head_dim
    module.face_adapter = nn.ModuleList(
        of_diffusers.WanAnimateFaceBlockCrossAttention(
            *heads, eps=EPS, cross_attention_dim_head=sizes.head_dim
        )
        for _ in layers(sizes)
    )


def layers(sizes: WanSizes) -> Sequence[int]:
    """The blocks after which the model looks at faces."""
    return range(0, sizes.num_blocks, BLOCKS_PER_FACES)


def of_poses(
    embedding: Any, poses: torch.Tensor, grid: tuple[int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    """What a video of poses (B, 16, T', H, W) adds to the tokens (B, L, D) of a video.

    ``grid``: frames, rows and columns of its tokens. The first frame, a picture of who moves, has
    no pose; poses may be fewer than the other frames, or more.
    """
    embedded = embedding(poses.to(dtype))
    frames, *sides = grid
    if list(embedded.shape[3:]) != sides:
        raise InputError(
            f"Latents of poses of {FAMILY.label} must have an even height and width; got "
            f"{tuple(poses.shape)}. Give the video a width and a height that are multiples of 16."
        )
    embedded = embedded[:, :, : frames - 1]
    missing = frames - 1 - embedded.shape[2]
    return F.pad(embedded, (0, 0, 0, 0, 1, missing)).flatten(2).transpose(1, 2)


def of_faces(module: Any, faces: torch.Tensor, frames: int) -> torch.Tensor:
    """Videos of faces (B, 3, T', 512, 512) as the blocks look at them: (B, frames, 5, D).

    Frames that have no face, as the first, are zero.
    """
    pictures = faces.transpose(1, 2).flatten(0, 1)
    motion = torch.cat([module.motion_encoder(some) for some in pictures.split(_AT_ONCE)])
    found = module.face_encoder(motion.unflatten(0, (faces.shape[0], -1)))[:, : frames - 1]
    return F.pad(found, (0, 0, 0, 0, 1, frames - 1 - found.shape[1]))


def keys_and_values(
    blocks: Sequence[Any], faces: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of faces (B, T, 5, D), in each block that looks at them: (blocks, B, T, 5, N, K)."""
    normed = F.layer_norm(faces, faces.shape[-1:], eps=EPS)
    keys, values = [], []
    for block in blocks:
        k, v = block.to_kv(normed).unflatten(-1, (-1, head_dim)).chunk(2, dim=-2)
        keys.append(rms_norm(k, block.norm_k.weight, EPS))
        values.append(v)
    return torch.stack(keys), torch.stack(values)


def look_at_faces(
    block: Any,
    normed: torch.Tensor,
    faces: Pair,
    per_frame: int,
    shares: TokenShares,
) -> Product:
    """From each of this rank's tokens (B, l, D) to the face of its frame.

    ``faces``: keys and values (B, T, 5, N, K). ``per_frame``: tokens of a frame. A rank's stretch
    may begin and end within one.
    """
    length, start = normed.shape[1], shares.own_start(0)
    first, end = start // per_frame, -(-(start + length) // per_frame)
    before, after = start - first * per_frame, end * per_frame - start - length
    q = block.to_q(normed)
    q = rms_norm(q.unflatten(-1, faces[0].shape[-2:]), block.norm_q.weight, EPS)
    q = F.pad(q, (0, 0, 0, 0, before, after)).unflatten(1, (end - first, per_frame))
    k, v = (part[:, first:end].flatten(0, 1) for part in faces)
    found = attention(q.flatten(0, 1), k, v).unflatten(0, (-1, end - first)).flatten(1, 2)
    return block.to_out, found[:, before : before + length]
