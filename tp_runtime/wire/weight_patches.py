"""What a patch makes of a weight: the arithmetic of ComfyUI's LoRA loading.

Follows ``comfy.lora.calculate_weight``, ``comfy.weight_adapter`` and ``comfy.float`` of ComfyUI
0.3.75, operation by operation, on whole weights in fp32: the same patch gives the same numbers.
ComfyUI's process runs it on the meta device, which tells whether a patch fits a weight.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .protocol import WeightPatch

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_ROUNDED_AT_ONCE = 4096 * 4096  # elements; part of the arithmetic, since it orders the random ones
_EPS = torch.finfo(torch.float32).eps


class PatchError(Exception):
    """A patch does not fit the weight that it is for."""


@dataclass
class _Change:
    """What an adapter adds to a weight: ``factor * difference``.

    With a ``dora_scale``, the weight with ``alpha * difference`` added is normed instead.
    """

    difference: torch.Tensor
    factor: float
    alpha: float
    dora_scale: torch.Tensor | None


def patched(weight: torch.Tensor, patches: Iterable[WeightPatch]) -> torch.Tensor:
    """``weight`` (fp32) with the patches applied in order: in place, but for one that is larger.

    Factors are tensors on any device; they are used in fp32 on the weight's.

    Raises:
        PatchError: on the meta device, for a patch that does not fit.
    """
    for patch in patches:
        place = weight if patch.offset is None else weight.narrow(*patch.offset)
        if patch.strength_model != 1.0:
            place *= patch.strength_model
        if (shape := shape_after(patch)) is not None:
            weight = place = _padded(weight, shape)
        factors = [_on(place, factor) for factor in patch.factors]
        if patch.kind == "set":
            place.copy_(factors[0])
        elif patch.kind == "diff":
            if patch.strength != 0.0:
                place += FUNCTIONS[patch.function](patch.strength * factors[0])
        else:
            change = _ADAPTERS[patch.kind](place, factors, patch.strength)
            _add(place, change, patch.strength, FUNCTIONS[patch.function])
    return weight


def shape_after(patch: WeightPatch) -> tuple[int, ...] | None:
    """The shape that a patch gives its weight, by adding zeros; None: it leaves it as it is."""
    if patch.offset is not None:
        return None
    if patch.kind == "lora" and patch.factors[5] is not None:
        return tuple(patch.factors[5])
    if patch.kind == "diff" and len(patch.factors) > 1 and patch.factors[1]["pad_weight"]:
        return tuple(patch.factors[0].shape)
    return None


def _padded(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The weight in the corner of a larger one of zeros."""
    larger = weight.new_zeros(shape)
    larger[tuple(map(slice, weight.shape))] = weight
    return larger


def check_fits(patch: WeightPatch, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape that a weight of ``shape`` has with the patch.

    Raises:
        PatchError: the patch cannot be applied to it.
    """
    weight = torch.empty(tuple(shape), device="meta")
    wanted = shape_after(patch)
    if wanted is not None:
        pairs = list(zip(shape, wanted, strict=False))
        if len(wanted) != len(shape) or any(before > after for before, after in pairs):
            raise PatchError(f"{tuple(shape)} cannot become {wanted} by adding zeros to it")
    try:
        if wanted is None and patch.kind == "diff" and patch.strength != 0.0:
            place = weight if patch.offset is None else weight.narrow(*patch.offset)
            if patch.factors[0].shape != place.shape:  # it would be broadcast
                raise PatchError(f"{tuple(patch.factors[0].shape)} is not {tuple(place.shape)}")
        return tuple(patched(weight, [patch]).shape)
    except (RuntimeError, IndexError, TypeError) as error:
        raise PatchError(str(error)) from error


def _on(weight: torch.Tensor, factor: Any) -> Any:
    return factor.to(weight.device, torch.float32) if isinstance(factor, torch.Tensor) else factor


def _add(
    weight: torch.Tensor,
    change: _Change,
    strength: float,
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    if change.dora_scale is None:
        # In its place: a wide weight's is 1.3 GiB.
        weight += function(change.difference.mul_(change.factor))
        return
    decomposed = weight + function(change.difference * change.alpha)
    if change.dora_scale.shape[0] == weight.shape[0]:
        norm = _norm_of_rows(weight)
    else:
        norm = _norm_of_rows(decomposed.transpose(0, 1)).transpose(0, 1)
    decomposed *= change.dora_scale / (norm + _EPS)
    if strength == 1.0:
        weight.copy_(decomposed)
    else:
        weight += strength * (decomposed - weight)


def _norm_of_rows(weight: torch.Tensor) -> torch.Tensor:
    """(N, …) → (N, 1, …)."""
    norm = weight.reshape(weight.shape[0], -1).norm(dim=1, keepdim=True)
    return norm.reshape(-1, *[1] * (weight.ndim - 1))


# --- adapters: the weight, the factors as comfy.weight_adapter orders them, the strength ---------


def _lora(weight: torch.Tensor, factors: list[Any], strength: float) -> _Change:
    up, down, alpha, mid, dora_scale, _ = factors
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    if mid is not None:
        shape = (down.shape[1], down.shape[0], *mid.shape[2:4])
        down = torch.mm(down.transpose(0, 1).flatten(1), mid.transpose(0, 1).flatten(1))
        down = down.reshape(shape).transpose(0, 1)
    difference = torch.mm(up.flatten(1), down.flatten(1)).reshape(weight.shape)
    return _Change(difference, strength * scale, scale, dora_scale)


def _loha(weight: torch.Tensor, factors: list[Any], strength: float) -> _Change:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, dora_scale = factors
    scale = 1.0 if alpha is None else alpha / w1_b.shape[0]
    first = torch.mm(w1_a, w1_b) if t1 is None else _tucker(t1, w1_b, w1_a)
    second = torch.mm(w2_a, w2_b) if t1 is None else _tucker(t2, w2_b, w2_a)
    difference = (first * second).reshape(weight.shape)
    return _Change(difference, strength * scale, scale, dora_scale)


def _lokr(weight: torch.Tensor, factors: list[Any], strength: float) -> _Change:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, dora_scale = factors
    rank = None
    if w1 is None:
        rank, w1 = w1_b.shape[0], torch.mm(w1_a, w1_b)
    if w2 is None:
        rank = w2_b.shape[0]
        w2 = torch.mm(w2_a, w2_b) if t2 is None else _tucker(t2, w2_b, w2_a)
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    difference = torch.kron(w1, w2).reshape(weight.shape)
    return _Change(difference, strength * scale, scale, dora_scale)


def _tucker(core: torch.Tensor, right: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    return torch.einsum("i j k l, j r, i p -> p r k l", core, right, left)


def _glora(weight: torch.Tensor, factors: list[Any], strength: float) -> _Change:
    alpha, dora_scale = factors[4:]
    first, second, third, fourth = factors[:4]
    # An older layout has the pairs the other way round; a square weight of full rank has both.
    older = fourth.shape[1] == third.shape[0] == first.shape[0] == second.shape[1]
    newer = fourth.shape[0] == third.shape[1] == first.shape[1] == second.shape[0]
    if newer and not (older and second.shape[0] == weight.shape[0] == weight.shape[1]):
        older = False
    rank = first.shape[0] if older else second.shape[0]
    a1, a2, b1, b2 = (factor.flatten(1) for factor in factors[:4])
    scale = 1.0 if alpha is None else alpha / rank
    if older:
        change = torch.mm(torch.mm(weight.flatten(1), a2), a1)
        difference = (torch.mm(b2, b1) + change).reshape(weight.shape)
    else:
        if weight.ndim > 2:
            change = torch.einsum("o i ..., i j -> o j ...", weight, a1)
            change = torch.einsum("o i ..., i j -> o j ...", change, a2)
        else:
            change = torch.mm(torch.mm(weight, a1), a2)
        difference = change.reshape(weight.shape) + torch.mm(b1, b2).reshape(weight.shape)
    return _Change(difference, strength * scale, scale, dora_scale)


def _oft(weight: torch.Tensor, factors: list[Any], strength: float) -> _Change:
    blocks, _, alpha, dora_scale = factors
    alpha = alpha or 0.0
    identity = torch.eye(blocks.shape[1], device=blocks.device)
    rotation = _rotation(blocks, alpha)
    difference = torch.einsum(
        "k n m, k n ... -> k m ...",
        rotation * strength - strength * identity,
        weight.reshape(*blocks.shape[:2], *weight.shape[1:]),
    ).reshape(weight.shape)
    return _Change(difference, strength, alpha, dora_scale)


def _boft(weight: torch.Tensor, factors: list[Any], strength: float) -> _Change:
    blocks, rescale, alpha, dora_scale = factors
    if alpha is None:
        raise PatchError("it has no alpha")
    size = blocks.shape[2]
    identity = torch.eye(size, device=blocks.device)
    turned = weight
    for level, rotation in enumerate(_rotation(blocks, alpha)):
        stride = 2**level * (size // 2)
        if strength != 1:
            rotation = rotation * strength + (1 - strength) * identity
        turned = turned.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
        turned = torch.einsum(
            "b i j, b j ... -> b i ...", rotation, turned.unflatten(0, (-1, size))
        )
        turned = turned.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    if rescale is not None:
        turned = turned * rescale
    return _Change(turned - weight, strength, alpha, dora_scale)


def _rotation(blocks: torch.Tensor, alpha: float) -> torch.Tensor:
    """Cayley's transform of the blocks' skew-symmetric parts, whose norm is bound by ``alpha``."""
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    skew = blocks - blocks.transpose(-1, -2)
    if alpha > 0:
        norm = torch.norm(skew) + 1e-8
        skew = torch.where(norm > alpha, skew * alpha / norm, skew)
    return (identity + skew) @ (identity - skew).inverse()


_ADAPTERS = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "glora": _glora,
    "oft": _oft,
    "boft": _boft,
}
KINDS = frozenset({"diff", "set", *_ADAPTERS})


def _swap_scale_shift(difference: torch.Tensor) -> torch.Tensor:
    shift, scale = difference.chunk(2)
    return torch.cat((scale, shift))


# What ComfyUI's key maps may do to a difference; None: nothing.
FUNCTIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda difference: difference,
    "swap_scale_shift": _swap_scale_shift,
}


# --- rounding ------------------------------------------------------------------------------------


def rounded(
    weight: torch.Tensor, dtype: torch.dtype, seed: int, by_bytes: bool = False
) -> torch.Tensor:
    """``weight`` in another dtype; to fp8 stochastically, with ``seed``, as ComfyUI does.

    ``by_bytes``: with random bytes, which ComfyUI draws where it has comfy-kitchen
    (``comfy/float.py`` of 0.33), and not with random numbers in fp16 (0.3.75).
    """
    if dtype not in FP8_DTYPES:
        return weight.to(dtype)
    device = weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    bytes_drawn = (
        torch.randint(0, 256, weight.shape, dtype=torch.uint8, device=device, generator=generator)
        if by_bytes
        else None
    )
    result = torch.empty_like(weight, dtype=dtype)
    for piece in _pieces(weight):
        if bytes_drawn is None:
            size = weight[piece].shape
            chance = torch.rand(size, dtype=torch.float16, device=device, generator=generator)
        else:
            chance = bytes_drawn[piece].half() / 256
        result[piece].copy_(_rounded_to_fp8(weight[piece], dtype, chance))
    return result


def rounded_to_fp4(weight: torch.Tensor, seed: int) -> torch.Tensor:
    """(rows, columns) up to 6 → (rows, columns / 2) uint8: numbers of four bits (E2M1), the first
    of two in the upper half; up or down by chance, with ``seed``, as ComfyUI 0.33 does.
    """
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    found = []
    for piece in _pieces(weight):
        values = weight[piece]
        sign = torch.signbit(values).to(torch.uint8) << 3
        step = 2.0 ** ((values.abs().log2() + 1.0).floor().clamp(0, 3) - 2.0) * 1.25
        chance = torch.rand(
            values.size(), dtype=values.dtype, device=values.device, generator=generator
        )
        size = (values + (chance - 0.5) * step).abs()
        exponent = (size.log2() + 1.1925).floor().clamp(0, 3)
        mantissa = torch.where(
            exponent > 0, (size / 2.0 ** (exponent - 1) - 1.0) * 2.0, size * 2.0
        ).round()
        bits = sign | (exponent.to(torch.uint8) << 1) | mantissa.to(torch.uint8)
        found.append((bits[:, 0::2] << 4) | bits[:, 1::2])
    return torch.cat(found)


def _pieces(weight: torch.Tensor) -> Iterator[slice]:
    """The rows that are rounded at once, in the order of their random numbers."""
    num_slices = max(1, weight.numel() / _ROUNDED_AT_ONCE)
    rows = max(1, round(weight.shape[0] / num_slices))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def _rounded_to_fp8(weight: torch.Tensor, dtype: torch.dtype, chance: torch.Tensor) -> torch.Tensor:
    """The numbers of ``dtype`` next to ``weight`` in fp16; ``chance``, below 1, is added before
    they are rounded down.
    """
    exponent_bits, mantissa_bits = (4, 3) if dtype == torch.float8_e4m3fn else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    steps = 2**mantissa_bits
    values = weight.half()
    size = values.abs()
    exponent = (size.log2().floor() + bias).clamp(0, 2**exponent_bits - 1)
    normal = exponent != 0
    unit = 2.0 ** (exponent - bias)
    mantissa = torch.where(
        normal, (size / unit - 1.0) * steps, size / 2.0 ** (1 - bias - mantissa_bits)
    )
    mantissa = (mantissa + chance).floor() / steps
    sign = torch.where(size == 0, 0, values.sign())
    result = sign * torch.where(normal, unit * (1.0 + mantissa), 2.0 ** (1 - bias) * mantissa)
    limits = torch.finfo(dtype)
    return result.clamp(limits.min, limits.max)
