"""Arithmetic that several families share: attention, rotary embedding, norms."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..gpu.epilogue import Epilogue, Product
from ..gpu.graphs import fast_attention, fused, optimising
from .rows import TIME_CHANNELS

TIME_SCALE = 1000.0  # of timesteps of 0 to 1, before their sinusoids
MAX_PERIOD = 10000.0  # of these


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over this rank's heads: q (B, L, N, K), k and v (B, L', N', K) → (B, L, N·K).

    N is a multiple of N', the key and value heads, which neighbouring query heads share. ``mask``:
    bool or added to the scores, of a shape that broadcasts to (B, N, L, L').
    """
    fast = fast_attention()
    if fast is not None:
        return fast(q, k, v, mask).flatten(2)
    grouped = q.shape[2] != k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return found.transpose(1, 2).flatten(2)


def spread_heads(x: torch.Tensor, sharers: Sequence[int]) -> torch.Tensor:
    """Each key or value head as often as queries share it, where these numbers differ.

    (B, L, N', K) → (B, L, N, K); ``sharers``: of this rank, ``Split.sharers``.
    """
    heads = zip(x.split(1, dim=2), sharers, strict=True)
    return torch.cat([one.expand(-1, -1, count, -1) for one, count in heads], dim=2)


def project(linear: Any, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """A column-parallel linear of (B, L, D), and its GELU, by tanh, if that is asked for."""
    if optimising():
        from ..gpu.products import multiply  # here, since without a GPU nothing asks for it

        return multiply(linear, x, linear.bias, gelu=gelu)
    found = linear(x)
    return F.gelu(found, approximate="tanh") if gelu else found


def project_apart(
    linear: Any, x: torch.Tensor, width: int, *, apart: bool
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """A column-parallel linear of (B, L, D): its first ``width`` features, and what gives the rest.

    ``apart``: that computes them, as a product of its own, if the weight can be divided.
    """
    if apart:
        from ..gpu import products  # here, since others need none of vLLM

        if products.is_plain(linear):
            return products.multiply_apart(linear, x, width)
    first, rest = linear(x).tensor_split([width], dim=-1)
    return first, lambda: rest


def gelu_mlp(module: Any, x: torch.Tensor) -> Product:
    """Of diffusers' ``FeedForward`` with GELU, by tanh: what is left to project."""
    up, down = module.net[0].proj, module.net[2]
    return down, project(up, x, gelu=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """RMS norm over the last axis, as ComfyUI computes it (comfy/rmsnorm.py, 0.3.75).

    Computed in the dtype of the weight, which may be fp32 where ``x`` is not; returned in that of
    ``x``.
    """
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)


@fused
def silu_gate(gate_and_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of the features, times the second half."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def timestep_embedding(
    t: torch.Tensor, dim: int = TIME_CHANNELS, scale: float = 1.0
) -> torch.Tensor:
    """Sinusoids (..., dim) of (...), cosines first, in fp32: bf16 timesteps lose up to 30 %."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = scale * (t[..., None].float() * torch.exp(-math.log(MAX_PERIOD) * steps / half))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def embedded_time(
    embed: Callable[[torch.Tensor], torch.Tensor], times: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Timesteps of 0 to 1, or guidances (B,) → what ``embed`` makes of their sinusoids (B, D)."""
    return embed(timestep_embedding(TIME_SCALE * times).to(dtype))


def with_time_zero(timesteps: torch.Tensor, zero_time: bool) -> torch.Tensor:
    """(B,), or (2 B,) with as many times 0, for references that are at that time."""
    return torch.cat((timesteps, timesteps * 0)) if zero_time else timesteps


def rope_rotation(positions: torch.Tensor, axes_dims: Sequence[int], theta: float) -> torch.Tensor:
    """Cosine and sine of every token's angles: (L, axes) → (1, L, 1, K/2, 2) fp32.

    Angles are computed in fp64, as ComfyUI does (comfy/ldm/flux/math.py, 0.3.75).
    """
    angles = []
    for axis, dim in enumerate(axes_dims):
        exponent = torch.linspace(
            0, (dim - 2) / dim, steps=dim // 2, dtype=torch.float64, device=positions.device
        )
        angles.append(positions[:, axis, None].double() / theta**exponent)
    angle = torch.cat(angles, dim=-1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).float()[None, :, None]


def rotate_pairs(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring features of (B, L, N, K) in the dtype of ``rotation``; keep ``x``'s."""
    even, odd = x.to(rotation.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    rotated = (
        torch.addcmul(even * cos, odd, sin, value=-1),
        torch.addcmul(even * sin, odd, cos),
    )
    return torch.stack(rotated, dim=-1).flatten(-2).type_as(x)


# A stretch of tokens: the heads of their q, k and v behind one another, (B, L, N + 2 N', K), and
# the weights of q's and k's norm (K,).
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def heads_of(qkv: torch.Tensor, norm_q: Any, norm_k: Any) -> Heads:
    """What ``rotated_heads`` takes, of (B, L, 3·N·K)."""
    head_dim = norm_q.weight.shape[0]
    return qkv.unflatten(-1, (-1, head_dim)), norm_q.weight, norm_k.weight


def rotated_heads(
    parts: list[Heads], rotation: torch.Tensor, eps: float | None, num_kv_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (B, L, N, K), k and v (B, L, N', K) of all tokens; q and k normed and then rotated.

    ``eps`` None is the smallest of fp32, as where ComfyUI leaves it to torch. ``num_kv_heads``: N',
    if it is not N.
    """
    num_heads, head_dim = parts[0][0].shape[2:]
    num_kv = num_heads // 3 if num_kv_heads is None else num_kv_heads
    if optimising() and head_dim & (head_dim - 1) == 0:
        from ..gpu import kernels  # here, since without a GPU there may be no Triton

        smallest = torch.finfo(torch.float32).eps
        return kernels.rotated_heads(parts, rotation, eps or smallest, num_kv)
    found: list[tuple[torch.Tensor, ...]] = []
    start = 0
    for qkv, norm_q, norm_k in parts:
        here = rotation[:, start : start + qkv.shape[1]]
        q, k, v = qkv.split((num_heads - 2 * num_kv, num_kv, num_kv), dim=2)
        q = rotate_pairs(rms_norm(q, norm_q, eps), here)
        found.append((q, rotate_pairs(rms_norm(k, norm_k, eps), here), v))
        start += qkv.shape[1]
    if len(found) > 1:
        found = [tuple(torch.cat(same, dim=1) for same in zip(*found, strict=True))]
    q, k, v = found[0]
    return q, k, v


def _norm(tokens: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    weight, eps = epilogue.weight, epilogue.eps
    if epilogue.norm == "none":
        return tokens
    if epilogue.norm == "rms":
        if weight is None:
            normed = F.rms_norm(tokens, tokens.shape[-1:], None, eps)
        else:
            normed = rms_norm(tokens, weight, eps)
    else:
        normed = F.layer_norm(tokens, tokens.shape[-1:], weight, epilogue.bias, eps)
    if epilogue.scale is None:
        return normed
    if epilogue.shift is None:
        return normed * (1 + epilogue.scale)
    return torch.addcmul(epilogue.shift, normed, 1 + epilogue.scale)


@fused
def first_norm(tokens: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
    """The norm of (B, L, D), before which there is no residual; ``epilogue``: of one stream."""
    return _norm(tokens, epilogue)


def first_norms(streams: Sequence[torch.Tensor], epilogue: Epilogue) -> torch.Tensor:
    """The same of tokens of several streams, which lie behind one another in what is returned."""
    found = [first_norm(one, epilogue.of_stream(index)) for index, one in enumerate(streams)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


@fused
def residual_norm(
    tokens: torch.Tensor, update: torch.Tensor, epilogue: Epilogue
) -> tuple[torch.Tensor, torch.Tensor]:
    """``tokens`` plus the gated update, and the norm of that sum, both (B, L, D).

    ``epilogue``: of one stream (``Epilogue.of_stream``). Without a norm the sum is returned twice.
    """
    gate = epilogue.gate
    if epilogue.update_weight is not None:
        update = rms_norm(update, epilogue.update_weight, epilogue.eps)
        gate = None if gate is None else gate.tanh()
    tokens = tokens + (update if gate is None else update * gate)
    if epilogue.limit:
        tokens = limited(tokens)
    return tokens, _norm(tokens, epilogue)


def limited(x: torch.Tensor) -> torch.Tensor:
    """In fp16, values that overflow are brought back, where ComfyUI does so."""
    if x.dtype != torch.float16:
        return x
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)


class HeadsOfRank(NamedTuple):
    """This rank's features of all heads, whose norm is over those of all ranks: (B, L, N·K).

    ``weight`` (N·K,); ``width``: of all ranks the features, without those that only pad and are
    zero. ``rotation``: (B or 1, L, N or 1, K/2, 2), or None; with ``halves``, of the first half of
    a head against the second, else of neighbouring features.
    """

    x: torch.Tensor
    weight: torch.Tensor
    width: int
    head_dim: int
    rotation: torch.Tensor | None = None
    halves: bool = False


def normed_over_ranks(
    parts: Sequence[HeadsOfRank], eps: float, add_up: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """RMS norms over the heads of all ranks, and rotary embedding: (B, L, N, K) of each.

    ``add_up`` sums a tensor over the ranks: once, in fp32, for all parts.
    """
    if optimising() and all(part.head_dim & (part.head_dim - 1) == 0 for part in parts):
        from ..gpu import kernels  # here, since without a GPU there may be no Triton

        if all(part.x.shape[-1] == part.width for part in parts):  # there are no other ranks
            return [kernels.normed_heads(part, None, eps) for part in parts]
        own = [kernels.sum_of_squares(part.x) for part in parts]
        sums = add_up(torch.cat(own)).split([len(one) for one in own])
        return [kernels.normed_heads(*both, eps) for both in zip(parts, sums, strict=True)]
    squares = [part.x.float().square().sum(-1) for part in parts]
    summed = add_up(torch.cat([one.flatten() for one in squares]))
    found = []
    for part, of_part in zip(parts, summed.split([one.numel() for one in squares]), strict=True):
        x, weight = part.x.float(), part.weight.float()
        mean = of_part.view(x.shape[:2]) / part.width
        normed = (x * torch.rsqrt(mean + eps)[..., None] * weight).to(part.x.dtype)
        heads = normed.unflatten(-1, (-1, part.head_dim))
        if part.rotation is not None:
            rotate = rotate_halves if part.halves else rotate_pairs
            heads = rotate(heads, part.rotation)
        found.append(heads)
    return found


def rotate_halves(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate the first half of the features of (B, L, N, K) against the second.

    In the dtype of ``rotation`` (B, L, N, K/2, 2); keeps that of ``x``.
    """
    first, second = x.to(rotation.dtype).chunk(2, dim=-1)
    cos, sin = rotation.unbind(-1)
    rotated = (
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    )
    return torch.cat(rotated, dim=-1).type_as(x)
