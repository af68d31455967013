"""How Wan Animate 2 looks at a video of poses: ComfyUI's ``WanAnimate2Model`` (0.33,
comfy/ldm/wan/model_animate2.py).

That video passes through the blocks, too, at a time of its own, and each frame of what is made
looks at one of its frames in every block. Nothing of it changes over a generation: ``condition``
computes it once, where ComfyUI does so at every evaluation, or keeps it if asked to.
"""

from functools import partial
from typing import TYPE_CHECKING

import torch

from ...errors import InputError
from ..layers import attention, first_norms
from .family import FAMILY
from .layers import Pair, as_tokens, before_block, by_block, padded, positions_of, rows_of

if TYPE_CHECKING:
    from .forward import Forward


def of_poses(
    forward: "Forward",
    x: torch.Tensor,
    poses: torch.Tensor,
    context: torch.Tensor,
    clip_fea: torch.Tensor | None,
    strength: float,
) -> list[Pair]:
    """Keys and values, in every block (B, L', N, K), of a video of poses (B, 16, T', H, W).

    ``context``, ``clip_fea``: what it looks at. Values are multiplied by ``strength``. B is 1 if
    all items of the batch are equal, as where both conditions of a step are one batch. N: heads of
    which this rank computes attention.
    """
    if poses.shape[2] != x.shape[2] - 1:
        raise InputError(
            f"Latents of poses of {FAMILY.label} must have a frame for each of the latent's but "
            f"the first, which is the reference picture's: {x.shape[2] - 1}; got "
            f"{poses.shape[2]}. Set them with 'WanAnimate2ToVideo'."
        )
    given = [poses, context, *([] if clip_fea is None else [clip_fea])]
    if all(bool((one == one[:1]).all()) for one in given):
        poses, context = poses[:1], context[:1]
        clip_fea = None if clip_fea is None else clip_fea[:1]
    known = [one for one in (poses, context, clip_fea) if one is not None]
    key = x.shape[2:], x.dtype, strength
    return forward.memo.part(
        key, known, partial(_passed, forward, x, poses, context, clip_fea, strength)
    )


def _passed(
    forward: "Forward",
    x: torch.Tensor,
    poses: torch.Tensor,
    context: torch.Tensor,
    clip_fea: torch.Tensor | None,
    strength: float,
) -> list[Pair]:
    """What ``of_poses`` returns, computed."""
    model, width = forward.model, -(-x.shape[4] // 2)
    video = padded(poses)
    known = torch.cat([video, torch.ones_like(video[:, :4]), video], dim=1)
    shares, tokens = forward.shared(as_tokens(model.patch_embedding(known.float()).to(x.dtype)))
    beside = {"shift_t": 1.0, "shift_x": float(width)}
    positions = positions_of((poses.shape[2], *x.shape[3:]), beside, x)
    rotation = shares.own(forward.rotation_of(positions))
    prompts = by_block(**forward.prompts_of(context, clip_fea))
    _, modulation = forward.embedded_time(torch.ones(len(poses), device=x.device), x.dtype)
    rows = [rows_of(block.scale_shift_table, modulation, None) for block in model.blocks]
    found: list[Pair] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scaled = v if strength == 1 else v * strength
        own = [shares.own_heads(shares.whole(part)).contiguous() for part in (k, scaled)]
        found.append((own[0], own[1]))
        return shares.attention(q, k, v)

    normed = first_norms([tokens], before_block(rows[0]))
    for index, block in enumerate(model.blocks):
        following = rows[index + 1] if index + 1 < len(rows) else None
        of_block = block, rows[index], prompts[index], rotation, following
        tokens, normed = forward.block(tokens, normed, *of_block, attend)
    return found


def look_at_poses(
    poses: Pair | None,
    per_frame: int,
    reference_strength: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    _mask: None,
) -> torch.Tensor:
    """Attention (B, L, N·K) of all tokens of a video to all, and to the poses of their frame.

    ``poses``: keys and values (B or 1, L - per_frame, N, K) of each frame but the first, which is
    the reference picture's: values of its tokens are multiplied by ``reference_strength``.
    """
    if reference_strength != 1:
        v = torch.cat([v[:, :per_frame] * reference_strength, v[:, per_frame:]], dim=1)
    if poses is None:
        return attention(q, k, v)
    length = q.shape[1]
    of_poses = [part.expand(len(q), -1, -1, -1) for part in poses]
    with_pose = [
        torch.cat([part, pose[:, :per_frame]], dim=1)
        for part, pose in zip((k, v), of_poses, strict=True)
    ]
    found = [attention(q[:, :per_frame], k, v)]
    for start in range(0, length - per_frame, per_frame):
        for part, pose in zip(with_pose, of_poses, strict=True):
            part[:, length:] = pose[:, start : start + per_frame]
        found.append(attention(q[:, start + per_frame : start + 2 * per_frame], *with_pose))
    return torch.cat(found, dim=1)
