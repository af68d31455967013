"""What several families' drivers share: attention, rotary embedding, norms, the memo."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..acceleration import fused
from ..errors import InputError


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over this rank's heads: three (B, L, N, K) → (B, L, N·K).

    ``mask``: bool or added to the scores, of a shape that broadcasts to (B, N, L, L).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """RMS norm over the last axis, as ComfyUI computes it (comfy/rmsnorm.py, 0.3.75)."""
    return F.rms_norm(x, weight.shape, weight, eps)


@fused
def silu_gate(gate_and_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of the features, times the second half."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def timestep_embedding(
    t: torch.Tensor, dim: int, max_period: float = 10000.0, scale: float = 1.0
) -> torch.Tensor:
    """Sinusoids (B, dim), cosines first, in fp32: bf16 timesteps lose up to 30 %."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = scale * (t[:, None].float() * torch.exp(-math.log(max_period) * steps / half))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


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


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm without weights, then scaled and shifted."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def pack_patches(x: torch.Tensor) -> torch.Tensor:
    """Patches of 2 x 2 as tokens: (B, C, H, W) → (B, L, 4·C); odd sizes are padded circularly."""
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="circular")
    patches = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B C h 2 w 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_patches(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, L, 4·C) → (B, C, height, width), the inverse of ``pack_patches``."""
    rows = -(-height // 2)
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, -1))  # B h w C 2 2
    x = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return x[:, :, :height, :width]


def grid_positions(index: float, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Positions (L, 3) of the tokens of an image, row by row: ``index``, its row's, its column's."""
    positions = torch.zeros(len(y), len(x), 3, dtype=torch.float32, device=y.device)
    positions[..., 0] = index
    positions[..., 1] += y[:, None]
    positions[..., 2] += x
    return positions.flatten(0, 1)


def place_references(
    references: Sequence[torch.Tensor], method: str, height: int, width: int
) -> list[tuple[float, int, int]]:
    """Where reference latents lie beside an image of ``height`` x ``width``: (index, top, left).

    ``method`` is one of: ``"index"`` and ``"negative_index"``, one behind another; ``"uxo"``,
    diagonally below the image; ``"offset"``, side by side on one plane. As ComfyUI does
    (comfy/ldm/flux/model.py and comfy/ldm/qwen_image/model.py, 0.3.75).
    """
    places: list[tuple[float, int, int]] = []
    down = right = 0
    for count, reference in enumerate(references, 1):
        rows, columns = reference.shape[-2:]
        if method in ("index", "negative_index"):
            places.append((float(count if method == "index" else -count), 0, 0))
        elif method == "uxo":
            places.append((0.0, height + height % 2 + down, width + width % 2 + right))
            down, right = down + rows, right + columns
        else:
            top, left = (0, right) if rows + down > columns + right else (down, 0)
            places.append((1.0, top, left))
            down, right = max(down, rows + top), max(right, columns + left)
    return places


def check_residuals(control: Mapping[str, Any], image: tuple[int, int, int], label: str) -> None:
    """Raises InputError if a ControlNet's residual does not fit image tokens of shape (B, L, D)."""
    batch, length, width = image
    for residual in (
        item for stack in control.values() for item in stack or () if item is not None
    ):
        shape = tuple(residual.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] > length or shape[2] != width:
            raise InputError(
                f"The ControlNet gives residuals of shape {shape}; {label} takes up to ({batch}, "
                f"{length}, {width}) here. Use a ControlNet made for {label}."
            )


def add_residual(
    tokens: torch.Tensor, stack: Sequence[torch.Tensor | None], index: int, start: int = 0
) -> torch.Tensor:
    """Add a ControlNet's residual, if it has one for this block, to the tokens from ``start`` on.

    ``tokens`` is changed in place.
    """
    residual = stack[index] if index < len(stack) else None
    if residual is not None:
        tokens[:, start : start + residual.shape[1]] += residual
    return tokens


Conditioning = dict[str, torch.Tensor]
# Puts the ranks' parts of the last axis together: (..., n) on each rank → (..., n · tp_size).
Gather = Callable[[torch.Tensor], torch.Tensor]


class Memo:
    """Conditioning of the last few generations, by what it was computed from.

    Its key is made of the names under which the rank holds the tensors, so an entry serves every
    step of a generation; least recently used first out.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        self._entries: OrderedDict[Hashable, Conditioning] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], Conditioning]) -> Conditioning:
        """What ``compute`` returned for this key, or returns now."""
        if key not in self._entries:
            self._entries[key] = compute()
            while len(self._entries) > self._limit:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]

    def clear(self) -> None:
        """Forget everything, for instance because weights have changed."""
        self._entries.clear()


class DriverBase:
    """A sharded module with the forward pass that ComfyUI expects of it, in two halves.

    ``condition`` is what stays the same over a generation (refined text, positions, ...): a
    function of every input but ``timesteps`` and of ``x`` only through its shape. ``step`` is the
    rest: tensors in, one tensor out, so that it can be recorded; ``run_step`` is what runs it.
    """

    label: str
    model: Any
    config: dict[str, Any]

    def __init__(self, model: nn.Module, config: dict[str, Any], gather: Gather) -> None:
        self.model = model
        self.config = config
        self.gather = gather
        self.run_step: Callable[..., torch.Tensor] = self.step
        self.memo = Memo()
        self._accepted = set(inspect.signature(self.condition).parameters)

    def condition(self, *args: Any, **inputs: Any) -> Conditioning:
        """The tensors that ``step`` takes besides ``x``, ``timesteps`` and ``control``.

        Raises:
            InputError: a tensor's shape does not fit.
        """
        raise NotImplementedError

    def step(self, *args: Any, **inputs: Any) -> torch.Tensor:
        """The model's prediction, of the shape and dtype of ``x``; ``timesteps`` (B,) fp32."""
        raise NotImplementedError

    def __call__(self, inputs: Mapping[str, Any], key: Hashable) -> torch.Tensor:
        """Evaluate the model. Inputs of one ``key`` have equal conditioning.

        Raises:
            InputError: an input does not fit, or the model has no use for it.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        x, timesteps = inputs["x"], inputs.pop("timesteps")
        per_step = {name: inputs.pop(name) for name in ("control",) if name in inputs}
        unknown = sorted(set(inputs) - self._accepted)
        if per_step and "control" not in inspect.signature(self.step).parameters:
            unknown.append("control")
        if unknown:
            raise InputError(
                f"{self.label} on the process group does not support the model input "
                f"{', '.join(unknown)}. Remove the node that sets it, or load the model with the "
                "stock 'Load Diffusion Model' node."
            )
        if timesteps.shape != x.shape[:1]:
            raise InputError(f"{x.shape[0]} latents need as many timesteps; got {timesteps.shape}.")
        key = (key, tuple(x.shape), x.dtype)
        conditioning = self.memo.get(key, lambda: self.condition(**inputs))
        return self.run_step(x=x, timesteps=timesteps, **conditioning, **per_step)
