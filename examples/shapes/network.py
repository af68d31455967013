"""The toy's networks, for training: modules whose state dicts are files as ComfyUI reads them.

`ZImage` computes what ComfyUI's NextDiT does (0.3.75, comfy/ldm/lumina/model.py, with
`z_image_modulation`), for one fixed size of picture and for captions of different lengths in one
batch. `Encoder` and `Decoder` are those of TAESD (https://github.com/madebyollin/taesd), which
ComfyUI's VAELoader takes from a single file. Encoding is linear and not trained: `encode`.

Shapes: B batch, H W latent size, L caption tokens, T all tokens, D width, K head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
PIXELS_PER_LATENT = 8
PATCH = 2
CAPTION_TOKENS = 32  # captions are filled up to this many tokens
TIME_FEATURES = 256  # also the width of the modulation input
TIME_SCALE = 1000.0
ROPE_THETA = 256.0
NORM_EPS = 1e-5
QK_NORM_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Size:
    """A Z-Image of toy size; a width below 256 would not fit its modulation."""

    dim: int = 256
    heads: int = 8
    layers: int = 4
    refiner_layers: int = 1
    ffn_dim: int = 256
    caption_dim: int = 64
    latent: int = 16  # height and width of the latent

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """RoPE dimensions of (caption position, row, column)."""
        head_dim = self.dim // self.heads
        return head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8


# --- latents ------------------------------------------------------------------------------------

# Rows: red, green, blue of -1…1. ComfyUI's latent2rgb preview of 16-channel latents shows these
# directions as that colour, at 0.45 of its contrast: previews of the toy are in its colours.
_COLOUR_DIRECTIONS = (
    (-40, -4, 71, -20, 23, -28, -20, -10, -25, 24, -61, 38, 22, -85, 38, -44),
    (17, -20, -107, -7, 36, 59, 50, 6, -30, 90, 76, -33, 14, 93, -97, -15),
    (36, 44, 19, 39, -17, -20, 18, -11, 81, -84, -22, 4, 16, -73, 22, -8),
)
_COLOUR_SCALE = 0.015
_DETAIL_SCALE = 2.0


def encoder_weight() -> Tensor:
    """(16, 3, 8, 8): mean colour of 8 x 8 pixels, and its differences across x, y and both.

    Each colour has three differences; they take nine directions orthogonal to the colours'.
    """
    colours = torch.tensor(_COLOUR_DIRECTIONS, dtype=torch.float64) * _COLOUR_SCALE
    others = torch.eye(LATENT_CHANNELS, 9, dtype=torch.float64)
    orthogonal, triangular = torch.linalg.qr(torch.cat([colours.T, others], dim=1))
    details = (orthogonal * triangular.diagonal().sign()).T[3:] * _DETAIL_SCALE
    half = torch.ones(PIXELS_PER_LATENT, dtype=torch.float64)
    half[PIXELS_PER_LATENT // 2 :] = -1
    full = half.abs()
    patterns = [
        torch.outer(y, x) for y, x in ((full, full), (full, half), (half, full), (half, half))
    ]
    directions = torch.cat([colours, details]).view(4, 3, LATENT_CHANNELS)
    weight = torch.einsum("pcl,pyx->lcyx", directions, torch.stack(patterns))
    return (weight / PIXELS_PER_LATENT**2).float()


def encode(pictures: Tensor, weight: Tensor) -> Tensor:
    """(B, 3, 8·H, 8·W) of 0…1 → latents (B, 16, H, W) as the transformer sees them."""
    return F.conv2d(pictures * 2 - 1, weight, stride=PIXELS_PER_LATENT)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class _ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + x).relu()


class Encoder(nn.Sequential):
    """`encode` with the layers of TAESD's encoder: pictures (B, 3, 8·H, 8·W) of 0…1 → latents.

    Exactly so: the blocks add nothing to what passes them, and colours are never negative. Two
    halvings take the mean of 2 x 2 pixels; the third puts the four means of 8 x 8 pixels into 12
    channels, from which the last layer takes the latent.
    """

    def __init__(self, weight: Tensor, width: int = 64) -> None:
        stages = [nn.Conv2d(3, width, 3, padding=1), _ConvBlock(width)]
        for _ in range(3):
            stages += [nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
            stages += [_ConvBlock(width) for _ in range(3)]
        super().__init__(*stages, nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1))
        self._set_weights(weight)

    @torch.no_grad()
    def _set_weights(self, weight: Tensor) -> None:
        for parameter in self.parameters():
            parameter.zero_()
        first, *halvings, last = (layer for layer in self if isinstance(layer, nn.Conv2d))
        rgb = torch.eye(3)
        first.weight[:3, :, 1, 1] = rgb
        for halving in halvings[:2]:
            halving.weight[:3, :3, 1:, 1:] = rgb[..., None, None] / 4
        for quarter, (y, x) in enumerate(((1, 1), (1, 2), (2, 1), (2, 2))):
            halvings[2].weight[3 * quarter : 3 * quarter + 3, :3, y, x] = rgb
        of_quarters = weight.unflatten(3, (2, -1)).unflatten(2, (2, -1)).sum((3, 5))
        last.weight[:, :12, 1, 1] = 2 * of_quarters.permute(0, 2, 3, 1).flatten(1)
        last.bias.copy_(-weight.sum((1, 2, 3)))


class Decoder(nn.Sequential):
    """Latents (B, 16, H, W) as the transformer sees them → pictures (B, 3, 8·H, 8·W) of 0…1."""

    def __init__(self, width: int = 64) -> None:
        stages = [_Clamp(), nn.Conv2d(LATENT_CHANNELS, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            stages += [_ConvBlock(width) for _ in range(3)]
            stages += [nn.Upsample(scale_factor=2)]
            stages += [nn.Conv2d(width, width, 3, padding=1, bias=False)]
        super().__init__(*stages, _ConvBlock(width), nn.Conv2d(width, 3, 3, padding=1))


# --- transformer --------------------------------------------------------------------------------


class _Norm(nn.RMSNorm):
    """In fp32, under autocast too: so is all that is added up from block to block."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of (B, T, heads, K) by `rotation`: cosines and sines (2, T, 1, K/2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    return torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1).flatten(-2)


class _Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        head_dim = size.dim // size.heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(size.dim, 3 * size.dim, bias=False)
        self.out = nn.Linear(size.dim, size.dim, bias=False)
        self.q_norm, self.k_norm = _Norm(head_dim, QK_NORM_EPS), _Norm(head_dim, QK_NORM_EPS)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        q, k = _rotate(self.q_norm(q), rotation), _rotate(self.k_norm(k), rotation)
        q, k, v = (part.to(v.dtype).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.w1 = nn.Linear(size.dim, size.ffn_dim, bias=False)
        self.w2 = nn.Linear(size.ffn_dim, size.dim, bias=False)
        self.w3 = nn.Linear(size.dim, size.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _Block(nn.Module):
    """A transformer block; those of the caption are not modulated by the time."""

    def __init__(self, size: Size, *, modulated: bool) -> None:
        super().__init__()
        self.attention = _Attention(size)
        self.feed_forward = _FeedForward(size)
        self.attention_norm1, self.attention_norm2 = _Norm(size.dim), _Norm(size.dim)
        self.ffn_norm1, self.ffn_norm2 = _Norm(size.dim), _Norm(size.dim)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(TIME_FEATURES, 4 * size.dim))

    def forward(self, x: Tensor, rotation: Tensor, time: Tensor | None = None) -> Tensor:
        scale1 = gate1 = scale2 = gate2 = 1.0
        if time is not None:
            modulation = self.adaLN_modulation(time).unsqueeze(1)
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
            scale1, gate1, scale2, gate2 = 1 + scale1, gate1.tanh(), 1 + scale2, gate2.tanh()
        attended = self.attention(self.attention_norm1(x) * scale1, rotation)
        x = x + gate1 * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x) * scale2)
        return x + gate2 * self.ffn_norm2(fed)


class _TimeEmbedder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = min(size.dim, 1024)
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, TIME_FEATURES)
        )

    def forward(self, time: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        angles = time[:, None] * torch.exp(-math.log(10000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class _FinalLayer(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.linear = nn.Linear(size.dim, PATCH**2 * LATENT_CHANNELS)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(TIME_FEATURES, size.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation(time).unsqueeze(1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)


class ZImage(nn.Module):
    """Predicts noise - data, the derivative of the noised latent to sigma."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        refiners = range(size.refiner_layers)
        self.x_embedder = nn.Linear(PATCH**2 * LATENT_CHANNELS, size.dim)
        self.noise_refiner = nn.ModuleList(_Block(size, modulated=True) for _ in refiners)
        self.context_refiner = nn.ModuleList(_Block(size, modulated=False) for _ in refiners)
        self.t_embedder = _TimeEmbedder(size)
        self.cap_embedder = nn.Sequential(
            _Norm(size.caption_dim), nn.Linear(size.caption_dim, size.dim)
        )
        self.layers = nn.ModuleList(_Block(size, modulated=True) for _ in range(size.layers))
        self.norm_final = _Norm(size.dim)  # in the file, used by nobody
        self.final_layer = _FinalLayer(size)
        self.x_pad_token = nn.Parameter(torch.zeros(1, size.dim))  # the picture needs none
        self.cap_pad_token = nn.Parameter(0.02 * torch.randn(1, size.dim))
        self.register_buffer("rotation", self._rotation(), persistent=False)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        """Closed gates and a silent last layer make the first steps of training calm."""
        for block in [*self.noise_refiner, *self.layers]:
            nn.init.zeros_(block.adaLN_modulation[0].weight)
            nn.init.zeros_(block.adaLN_modulation[0].bias)
        nn.init.zeros_(self.final_layer.linear.weight)
        nn.init.zeros_(self.final_layer.linear.bias)

    def _rotation(self) -> Tensor:
        """(2, T, 1, K/2). Captions count along the first axis; the picture lies at their end."""
        side = self.size.latent // PATCH
        positions = torch.zeros(CAPTION_TOKENS + side * side, 3, dtype=torch.float64)
        positions[:CAPTION_TOKENS, 0] = torch.arange(CAPTION_TOKENS) + 1
        positions[CAPTION_TOKENS:, 0] = CAPTION_TOKENS + 1
        positions[CAPTION_TOKENS:, 1] = torch.arange(side).repeat_interleave(side)
        positions[CAPTION_TOKENS:, 2] = torch.arange(side).repeat(side)
        angles = []
        for axis, dim in enumerate(self.size.axes_dims):
            frequencies = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles.append(positions[:, axis, None] * frequencies)
        angle = torch.cat(angles, dim=-1).unsqueeze(1)
        return torch.stack((angle.cos(), angle.sin())).float()

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor, is_word: Tensor) -> Tensor:
        """Velocity (B, 16, H, W) of the noised latent `x`.

        Args:
            x: sigma · noise + (1 - sigma) · data.
            sigma: (B,), 1 for noise alone.
            words: (B, 32, caption_dim), the words' vectors; what follows the words is not read.
            is_word: (B, 32), true for the words.
        """
        side = self.size.latent // PATCH
        caption_rotation, picture_rotation = self.rotation.split(
            (CAPTION_TOKENS, side * side), dim=1
        )
        time = self.t_embedder((1 - sigma) * TIME_SCALE)
        caption = self.cap_embedder(words)
        caption = torch.where(is_word[..., None], caption.float(), self.cap_pad_token)
        for block in self.context_refiner:
            caption = block(caption, caption_rotation)
        patches = x.unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH))
        patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        picture = self.x_embedder(patches).float()
        for block in self.noise_refiner:
            picture = block(picture, picture_rotation, time)
        tokens = torch.cat([caption, picture], dim=1)
        for block in self.layers:
            tokens = block(tokens, self.rotation, time)
        patches = self.final_layer(tokens[:, CAPTION_TOKENS:], time)
        patches = patches.unflatten(1, (side, side)).unflatten(3, (PATCH, PATCH, LATENT_CHANNELS))
        return -patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
