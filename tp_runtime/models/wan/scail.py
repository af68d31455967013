"""SCAIL and SCAIL-2: pictures of people, a video of poses, and masks of who is who.

ComfyUI's ``SCAILWanModel`` (0.33, comfy/ldm/wan/model.py). Shapes as in ``forward``.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ...errors import InputError
from ..forward import Conditioning
from .layers import check_length, padded, positions_with_poses

if TYPE_CHECKING:
    from .forward import Forward


def of_poses(
    forward: "Forward",
    x: torch.Tensor,
    size: tuple[int, int, int],
    pictures: tuple[torch.Tensor | None, torch.Tensor | None],
    poses: tuple[torch.Tensor | None, torch.Tensor | None],
    before: bool | None,
    rope_options: Mapping[str, float],
) -> Conditioning:
    """``rotation``, and if there are ``pictures`` of people, or ``poses``, each with masks,
    ``reference``, ``others`` and ``added``.

    ``size``: frames, rows and columns of the latents that are sampled. ``before``: see
    ``positions_with_poses``. Raises InputError for masks that do not fit.
    """
    model, found, count = forward.model, Conditioning(), 0
    picture, masks = pictures
    per_frame = math.prod(-(-side // 2) for side in size[1:])
    of_masks = None if masks is None else forward.of_patches(model.patch_embedding_mask, masks, x)
    if picture is not None:
        count = picture.shape[2]
        found["reference"] = forward.of_patches(model.patch_embedding, picture, x)
    if of_masks is not None and masks is not None:
        if masks.shape[2] != count + size[0]:
            raise InputError(
                f"Masks of references of {forward.label} have a frame for each of {count} "
                f"pictures and {size[0]} of the video; got {masks.shape[2]}. Set them with "
                "'WanSCAILToVideo'."
            )
        if picture is not None:
            found["reference"] = found["reference"] + of_masks[:, : count * per_frame]
        found["added"] = of_masks[:, count * per_frame :]
    video, their_masks = poses
    shape = None
    if video is not None:
        shape = padded(video).shape[2:]
        found["others"] = forward.of_patches(model.patch_embedding_pose, video, x)
        if their_masks is not None:
            embedded = forward.of_patches(model.patch_embedding_mask, their_masks, x)
            check_length("Masks of poses", their_masks, embedded, found["others"][0])
            found["others"] = found["others"] + embedded
    replaces = before is not None and not before
    positions = positions_with_poses(size, count, shape, replaces, rope_options, x)
    found["rotation"] = torch.cat([forward.rotation_of(one) for one in positions], dim=1)
    return found
