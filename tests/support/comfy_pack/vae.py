"""Autoencoders for the tests: ComfyUI's VAE takes files that say which one they stand for.

The published ones have hundreds of millions of parameters, and ComfyUI builds most of them in their
full size only. A file of `support.template_files` names in a tensor (metadata would not survive in
a checkpoint of several parts) what latents of it are like; the latent depends on the pixels.
"""

import json
import math
from functools import wraps
from types import SimpleNamespace
from typing import Any

import comfy.sd
import torch
import torch.nn.functional as F

MARK = "tp_test_vae"  # a tensor with the bytes of a JSON document: arguments of a class below
_AUDIO_RATE = 16000
_LONGEST = 16  # latents along a side: some nodes scale every picture to a million pixels first


class TinyVAE:
    """What the stock nodes use of ComfyUI's VAE for pictures and videos.

    `channels` of a latent, whose sides are those of the picture divided by `downscale`. `frames`:
    of a video that make one latent (after the first `lead`, which make one of their own); None: it
    takes pictures. `kept_apart`: several pictures are a batch, and each is a video of one frame.
    `colours`: 3, or 4 with transparency.
    """

    def __init__(
        self,
        channels: int,
        downscale: int,
        frames: int | None = None,
        *,
        lead: int = 1,
        kept_apart: bool = False,
        colours: int = 3,
    ) -> None:
        self.latent_channels = channels
        self.output_channels = colours
        self.latent_dim = 2 if frames is None else 3
        self.not_video = kept_apart
        self.downscale_index_formula = None if frames is None else (frames, downscale, downscale)
        self.patcher = SimpleNamespace()
        statistics = SimpleNamespace(un_normalize=_same, normalize=_same)
        self.first_stage_model = SimpleNamespace(per_channel_statistics=statistics)
        self._downscale = downscale
        self._frames = frames or 1
        self._lead = lead
        generator = torch.Generator().manual_seed(channels)
        self._mixed = torch.randn(channels, colours, generator=generator)

    def throw_exception_if_invalid(self) -> None:
        """It is always valid."""

    def spacial_compression_encode(self) -> int:
        return self._downscale

    def spacial_compression_decode(self) -> int:
        return self._downscale

    def temporal_compression_decode(self) -> int | None:
        return self._frames if self.latent_dim == 3 else None

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures (batch or frames, height, width, colours), or videos of five axes."""
        while pixels.shape[-1] < self.output_channels:
            pixels = torch.cat((pixels, torch.ones_like(pixels[..., :1])), -1)
        pixels = pixels[..., : self.output_channels].movedim(-1, 1).float()
        if pixels.ndim == 4 and self.latent_dim == 3:
            pixels = pixels.unsqueeze(2) if self.not_video else pixels.movedim(0, 1).unsqueeze(0)
        sides = [min(side // self._downscale, _LONGEST) for side in pixels.shape[-2:]]
        if self.latent_dim == 3:
            length = 1 + max(0, math.ceil((pixels.shape[2] - self._lead) / self._frames))
            mean = F.adaptive_avg_pool3d(pixels, (length, *sides))
        else:
            mean = F.adaptive_avg_pool2d(pixels, sides)
        return torch.sin(4 * torch.einsum("bc...,lc->bl...", mean, self._mixed))

    def encode_tiled(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.encode(pixels)

    def decode(self, latent: torch.Tensor, **_: Any) -> torch.Tensor:
        """The same sizes the other way."""
        colours = torch.einsum("bl...,lc->bc...", latent.float(), self._mixed).sigmoid()
        sides = [side * self._downscale for side in latent.shape[-2:]]
        if self.latent_dim == 3:
            length = self._lead + (latent.shape[2] - 1) * self._frames
            return F.interpolate(colours, (length, *sides)).movedim(1, -1)
        return F.interpolate(colours, sides).movedim(1, -1)

    def decode_tiled(self, latent: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.decode(latent)


class TinyAudioVAE:
    """What they use of it for sound: `rate` latents a second, of `channels` and `bins`."""

    def __init__(self, channels: int, bins: int, rate: float, *, bins_last: bool) -> None:
        self.latent_channels = channels
        self.audio_sample_rate = _AUDIO_RATE
        self.patcher = SimpleNamespace()
        self.first_stage_model = SimpleNamespace(
            output_sample_rate=_AUDIO_RATE,
            latent_frequency_bins=bins,
            num_of_latents_from_frames=lambda frames, per_second: math.ceil(
                frames * rate / per_second
            ),
        )
        self._bins = bins
        self._rate = rate
        self._bins_last = bins_last

    def throw_exception_if_invalid(self) -> None:
        """It is always valid."""

    def encode(self, samples: torch.Tensor) -> torch.Tensor:
        """Sound (batch, samples, ears)."""
        length = max(1, round(samples.shape[1] * self._rate / _AUDIO_RATE))
        mean = F.adaptive_avg_pool1d(samples.float().mean(-1)[:, None], length)
        waves = torch.arange(1, self.latent_channels * self._bins + 1)[:, None]
        found = torch.sin(mean * 20 + waves).unflatten(1, (self.latent_channels, self._bins))
        return found.movedim(2, 3) if self._bins_last else found

    def decode(self, latent: torch.Tensor, **_: Any) -> torch.Tensor:
        """Silence of about that length."""
        length = latent.shape[2 if self._bins_last else 3]
        return torch.zeros(len(latent), round(length * _AUDIO_RATE / self._rate), 2)


def extend_vae() -> None:
    """Have ComfyUI's VAE read the marked files."""
    stock = comfy.sd.VAE

    @wraps(stock, updated=())
    def make(sd: Any = None, *args: Any, **kwargs: Any) -> Any:
        for name, value in (sd or {}).items():
            if name.endswith(MARK):
                said = json.loads(bytes(value.tolist()))
                return TinyAudioVAE(**said) if "rate" in said else TinyVAE(**said)
        return stock(sd, *args, **kwargs)

    comfy.sd.VAE = make


def _same(latent: torch.Tensor) -> torch.Tensor:
    return latent
