"""What several families' drivers share: attention, rotary embedding, norms, the memo."""

import inspect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import InputError

T = TypeVar("T")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over this rank's heads: three (B, L, N, K) → (B, L, N·K)."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float | None) -> torch.Tensor:
    """RMS norm over the last axis, as ComfyUI computes it (comfy/rmsnorm.py, 0.3.75)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def timestep_embedding(t: torch.Tensor, dim: int, max_period: float = 10000.0) -> torch.Tensor:
    """Sinusoids (B, dim), cosines first, in fp32: bf16 timesteps lose up to 30 %."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(-math.log(max_period) * steps / half)
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
    """Rotate neighbouring features of (B, L, N, K) in fp32; the result has ``x``'s dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return (
        torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)
    )


class Memo:
    """Results that depend on a tensor which stays the same over a generation.

    Keyed by the identity of the tensor, which the rank holds for as long as the engine says;
    entries go when it does. One entry a tensor: another ``key`` replaces it.
    """

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()

    def get(self, tensor: torch.Tensor, key: Hashable, compute: Callable[[], T]) -> T:
        """The remembered result of ``compute`` for this tensor and key, or a new one."""
        entry = self._entries.get(tensor)
        if entry is None or entry[0] != key:
            entry = (key, compute())
            self._entries[tensor] = entry
        result: T = entry[1]
        return result

    def clear(self) -> None:
        """Forget everything, for instance because weights have changed."""
        self._entries.clear()


class DriverBase:
    """A sharded module with the forward pass that ComfyUI expects of it."""

    label: str

    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        self.model = model
        self.config = config
        self.memo = Memo()
        self._accepted = set(inspect.signature(self.forward).parameters)  # type: ignore[attr-defined]

    def __call__(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Evaluate ``forward``.

        Raises:
            InputError: an input is present that the model has no use for.
        """
        unknown = sorted(
            name
            for name, value in inputs.items()
            if name not in self._accepted and value is not None
        )
        if unknown:
            raise InputError(
                f"{self.label} on the process group does not support the model input "
                f"{', '.join(unknown)}. Remove the node that sets it, or load the model with the "
                "stock 'Load Diffusion Model' node."
            )
        known = {name: value for name, value in inputs.items() if name in self._accepted}
        output: torch.Tensor = self.forward(**known)  # type: ignore[attr-defined]
        return output
