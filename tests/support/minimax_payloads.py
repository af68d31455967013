"""What ComfyUI's MiniMax H3 nodes give the model beside the text: keyframes, references, masks.

Values are the same bits on every CPU (`support.random_numbers`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from support.random_numbers import normal

VIDEO = {
    "frames": 3,
    "height": 6,
    "width": 8,
    "length": 12,
    "time_scale": 1000.0,
    "lengths": {"samples": 5},
}
ODD = VIDEO | {"frames": 7, "height": 5, "width": 7, "length": 33, "lengths": {"samples": 9}}
TAGS = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 2, 1, 1, 0, 1]])
FULL = {"grid": None, "time_channels": 256, "time_hidden": 64, "time_dim": 48}


def random(seed: int, *shape: int) -> torch.Tensor:
    return normal(shape, torch.Generator().manual_seed(seed))


def payload(
    keyframes: list[dict[str, Any]] | None = None,
    refs: list[dict[str, Any]] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """As `MiniMaxH3.extra_conds` of ComfyUI's model_base.py makes it, but for the layout."""
    found: dict[str, Any] = {"seed": 7} | others
    conditions = [*(keyframes or ()), *(refs or ())]
    if keyframes:
        found["keyframes"] = keyframes
    if refs:
        found["refs"] = refs
    if conditions:
        found["cond_video_latents"] = [one["latent"] for one in conditions if "latent" in one]
        found["cond_audio_latents"] = [
            one["audio_latent"] for one in conditions if "audio_latent" in one
        ]
    return found


def keyframe(frame: int, seed: int, *, latents: int = 1, samples: int = 0) -> dict[str, Any]:
    """For latents of 6 x 8."""
    found: dict[str, Any] = {"resolved_frame_index": frame}
    if latents:
        found["latent"] = random(seed, 1, 24, latents, 6, 8)
    if samples:
        found["audio_latent"] = random(seed + 100, 1, 32, 2, samples)
    return found


def picture(rows: int, columns: int, seed: int) -> dict[str, Any]:
    latent = random(seed, 1, 24, 1, rows, columns)
    return {"kind": "image", "latent_h": rows, "latent_w": columns, "latent": latent}


def sound(samples: int, seed: int) -> dict[str, Any]:
    latent = random(seed, 1, 32, 2, samples)
    return {"kind": "audio", "ref_audio_t": samples, "audio_latent": latent}


def video(latents: int, samples: int, seed: int) -> dict[str, Any]:
    found = {
        "kind": "video_audio" if samples else "video",
        "latent_t": latents,
        "latent_h": 4,
        "latent_w": 6,
        "ref_audio_t": samples,
        "latent": random(seed, 1, 24, latents, 4, 6),
    }
    return found | ({"audio_latent": random(seed + 9, 1, 32, 2, samples)} if samples else {})


def masks() -> dict[str, torch.Tensor]:
    """Of a video of which a part is kept, and of a sound of which the beginning is."""
    of_video, of_audio = torch.ones(1, 1, 3, 6, 8), torch.ones(1, 1, 2, 5)
    of_video[:, :, 1:, :4, 2:6] = 0.0
    of_video[:, :, 0, 4:] = 0.25
    of_audio[..., :2] = 0.0
    of_audio[..., 2] = 0.5
    return {"denoise_mask": of_video, "audio_denoise_mask": of_audio}


_ENDS = payload([keyframe(0, 1), keyframe(8, 2)])
_REFERENCES = payload(
    refs=[picture(4, 6, 3), video(2, 4, 4), sound(3, 5), video(6, 0, 6)],
    text_token_tags=TAGS,
    seed=2**63 + 5,
)
_SHIFTS = {"minimax_h3_sigma_shift_video": 5.0, "minimax_h3_sigma_shift_audio": 2.0}
_GUIDES = payload(
    [keyframe(1, 7, latents=3, samples=4), keyframe(4, 8, latents=0, samples=2)],
    visual_cond_noise_aug=0.9,
    audio_cond_noise_aug=0.8,
)

# Changes of the tiny model's sizes, and arguments of `make_inputs`.
CASES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "text": ({}, VIDEO),
    "odd sizes": ({}, ODD),
    "first and last frame": ({}, VIDEO | {"minimax_payload": _ENDS}),
    "first and last frame, near the end": (
        {},
        VIDEO | {"minimax_payload": _ENDS, "timesteps": torch.tensor([0.5])},
    ),
    "guides": ({}, VIDEO | {"minimax_payload": _GUIDES}),
    "references": ({}, VIDEO | {"minimax_payload": _REFERENCES}),
    "masks": ({}, VIDEO | {"minimax_payload": _ENDS, "masks": masks()}),
    "even masks": (
        {},
        VIDEO | {"masks": {name: 0 * mask + 0.5 for name, mask in masks().items()}},
    ),
    "shifts": ({}, VIDEO | {"transformer_options": _SHIFTS}),
    "heads of the published model": ({"num_heads": 56}, VIDEO | {"minimax_payload": _ENDS}),
    "full file": (FULL, ODD),
    "full file, references and masks": (
        FULL,
        VIDEO | {"minimax_payload": _REFERENCES, "masks": masks()},
    ),
}
