"""The model in plain torch: video latents, a timestep for every token, text by cross-attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
PATCH = 2
TIME_CHANNELS = 32
CROSS_DIM = 24  # of a head of the cross-attention


def sinusoids(t: torch.Tensor) -> torch.Tensor:
    """(B, L) → (B, L, 32)."""
    half = TIME_CHANNELS // 2
    steps = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(half) / half)
    angles = 1000 * t[..., None] * steps
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def patchify(x: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) → (B, L, 4·C)."""
    patches = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse, of the latent's shape."""
    _, channels, frames, height, width = shape
    grid = tokens.unflatten(1, (frames, height // PATCH, width // PATCH))
    patches = grid.unflatten(4, (channels, PATCH, PATCH)).permute(0, 4, 1, 2, 5, 3, 6)
    return patches.flatten(5).flatten(3, 4)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, head_dim: int) -> torch.Tensor:
    q, k, v = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in (q, k, v))
    found = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return found.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Self-attention beside an MLP, then attention to the text."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        dim, kv, self.sizes = sizes.dim, sizes.num_kv_heads * sizes.head_dim, sizes
        self.widths = (dim, kv, kv, sizes.mlp_dim, sizes.mlp_dim)
        self.modulation = nn.Linear(dim, 3 * dim)
        self.qkv_mlp = nn.Linear(dim, sum(self.widths), bias=False)
        self.out = nn.Linear(dim + sizes.mlp_dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, EPS), nn.RMSNorm(kv, EPS)
        self.norm_cross = nn.LayerNorm(dim, EPS)
        cross = sizes.cross_heads * CROSS_DIM
        self.to_q, self.norm_cross_q = nn.Linear(dim, cross), nn.RMSNorm(cross, EPS)
        self.to_k, self.to_v = nn.Linear(dim, cross), nn.Linear(dim, cross)
        self.to_out = nn.Linear(cross, dim)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(time).chunk(3, dim=-1)
        normed = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift
        q, k, v, mlp_gate, up = self.qkv_mlp(normed).split(self.widths, dim=-1)
        attended = attend(self.norm_q(q), self.norm_k(k), v, self.sizes.head_dim)
        x = x + gate * self.out(torch.cat((attended, F.silu(mlp_gate) * up), dim=-1))
        q = self.norm_cross_q(self.to_q(self.norm_cross(x)))
        return x + self.to_out(attend(q, self.to_k(text), self.to_v(text), CROSS_DIM))


class Plain(nn.Module):
    """`forward(x, timesteps, context)`: (B, C, T, H, W), (B, L) and (B, L', width)."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        dim, patch = sizes.dim, PATCH**2 * sizes.channels
        self.patch_in, self.text_in = nn.Linear(patch, dim), nn.Linear(sizes.context_dim, dim)
        self.time_in = nn.Sequential(nn.Linear(TIME_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.num_blocks))
        self.last = nn.Linear(dim, patch)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: Any) -> torch.Tensor:
        tokens, text = self.patch_in(patchify(x)), self.text_in(context)
        time = F.silu(self.time_in(sinusoids(timesteps)))
        for block in self.blocks:
            tokens = block(tokens, text, time)
        normed = F.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        return unpatchify(self.last(normed), x.shape)
