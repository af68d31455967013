"""LTX-2's releases as tiny sizes, and random arguments of its forward, as ComfyUI's BaseModel
passes them: masks make timesteps.
"""

from collections.abc import Sequence
from typing import Any

import torch

from support.random_numbers import normal

# Changes of the tiny sizes, which are 2.5's.
OF_2_3 = {"ff_bias": True, "keyframe_mark": False}
OF_2_0 = OF_2_3 | {
    "text_modulation": False,
    "gated": False,
    "projects": True,
    "connector_head_dim": 12,
    "audio_connector_head_dim": 12,
    "connector_gated": False,
}
SIGMAS = (0.7, 0.3, 0.55)


def make_ltx2_inputs(
    sizes: Any,
    *,
    batch: int = 1,
    frames: int = 3,
    height: int = 2,
    width: int = 3,
    sound: int = 5,
    length: int = 9,
    first: float | None = None,
    spatial: bool = False,
    sound_mask: bool = False,
    masked_from: int = 0,
    guides: int = 0,
    dropped: Sequence[int] = (),
    dilated: bool = False,
    strengths: Sequence[float] = (),
    masks: Sequence[int | None] = (),
    reference: int = 0,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> dict[str, Any]:
    """`sound`: latents of it. `first`: how much of the first frame is noise. `spatial`: a mask that
    varies in a frame; `sound_mask`: one of the sound; both of the items `masked_from` one on.
    `guides`: the last frames, of which those `dropped` or every other row and column (`dilated`)
    are no tokens. `strengths` of guides that are looked at more or less, and frames of their
    `masks`. `reference`: latents of sound before.
    """
    generator = torch.Generator().manual_seed(1000 * batch + frames + height + length)

    def random(*shape: int) -> torch.Tensor:
        return normal(shape, generator).to(dtype)

    x = [random(batch, sizes.in_channels, frames, height, width)]
    if sound:
        x.append(random(batch, 8, sound, 16))
    times = torch.tensor(SIGMAS[:batch])
    inputs: dict[str, Any] = {
        "x": x,
        "timesteps": times,
        "a_timestep": times,
        "context": random(batch, length, sum(sizes.caption_dims)),
        "frame_rate": 24.0,
        "transformer_options": {},
    }
    mask = torch.ones(batch, 1, frames, height, width)
    if first is not None:
        mask[:, :, 0] = first
    if spatial:
        mask[masked_from:, :, 1, :1] = 0.25
    if guides:
        mask[:, :, -guides:] = 0.2
        mask[:, :, list(dropped)] = -1.0
        inputs["keyframe_idxs"] = _places(guides, height, width).expand(batch, -1, -1, -1)
    if dilated:
        mask[:, :, -guides:] = -1.0
        mask[:, :, -guides:, ::2, ::2] = 0.1
    if first is not None or spatial or guides:
        inputs["denoise_mask"] = mask.expand(-1, sizes.in_channels, -1, -1, -1).to(dtype)
        inputs["timesteps"] = (mask * times.view(-1, 1, 1, 1, 1)).flatten(2).transpose(1, 2)
    if sound_mask:
        of_sound = torch.linspace(0, 1, sound).view(1, -1, 1).repeat(batch, 1, 1)
        of_sound[:masked_from] = 1
        inputs["a_timestep"] = of_sound * times.view(-1, 1, 1)
    if strengths:
        each = guides // len(strengths)
        inputs["guide_attention_entries"] = [
            {
                "strength": strength,
                "pre_filter_count": each * height * width,
                "pixel_mask": None if pictures is None else _mask(pictures, height, width),
                "latent_shape": [each, height, width],
            }
            for strength, pictures in zip(strengths, masks or len(strengths) * [None], strict=True)
        ]
    if reference:
        inputs["ref_audio"] = {"tokens": random(1, reference, sizes.audio_channels)}
    return inputs | others


def _places(frames: int, height: int, width: int) -> torch.Tensor:
    """First and last pixel of guides from the 16th on, which no patch of the video has."""
    lines = 8 * torch.arange(frames) + 16, 32 * torch.arange(height) + 3, 32 * torch.arange(width)
    starts = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)
    return torch.stack((starts, starts + 32), dim=-1)[None]


def _mask(pictures: int, height: int, width: int) -> torch.Tensor:
    shape, generator = (1, 1, pictures, 16 * height, 16 * width), torch.Generator().manual_seed(3)
    return torch.randint(0, 64, shape, generator=generator) / 64
