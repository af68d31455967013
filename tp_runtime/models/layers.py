"""What several families' drivers share: attention, rotary embedding, norms, the memo."""

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ..fault_points import reach
from ..gpu.graphs import fast_attention, fused, optimising


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over this rank's heads: three (B, L, N, K) → (B, L, N·K).

    ``mask``: bool or added to the scores, of a shape that broadcasts to (B, N, L, L).
    """
    fast = fast_attention()
    if fast is not None:
        return fast(q, k, v, mask).flatten(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def project(linear: Any, x: torch.Tensor, *, gelu: bool = False) -> torch.Tensor:
    """A column-parallel linear of (B, L, D), and its GELU, by tanh, if that is asked for."""
    if optimising():
        from ..gpu.products import (
            multiply,  # here, since ComfyUI's process imports this module, too
        )

        return multiply(linear, x, linear.bias, gelu=gelu)
    found = linear(x)
    return F.gelu(found, approximate="tanh") if gelu else found


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


# A stretch of tokens: their q, k and v (B, L, 3, N, K), and the weights of q's and k's norm (K,).
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rotated_heads(
    parts: list[Heads], rotation: torch.Tensor, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of all tokens, each (B, L, N, K); q and k normed and then rotated.

    ``eps`` None is the smallest of fp32, as where ComfyUI leaves it to torch.
    """
    head_dim = parts[0][1].shape[0]
    if optimising() and head_dim & (head_dim - 1) == 0:
        from ..gpu import kernels  # here, since ComfyUI's process imports this module, too

        return kernels.rotated_heads(parts, rotation, eps or torch.finfo(torch.float32).eps)
    found: list[tuple[torch.Tensor, ...]] = []
    start = 0
    for qkv, norm_q, norm_k in parts:
        here = rotation[:, start : start + qkv.shape[1]]
        q, k, v = qkv.unbind(2)
        q = rotate_pairs(rms_norm(q, norm_q, eps), here)
        found.append((q, rotate_pairs(rms_norm(k, norm_k, eps), here), v))
        start += qkv.shape[1]
    if len(found) > 1:
        found = [tuple(torch.cat(same, dim=1) for same in zip(*found, strict=True))]
    q, k, v = found[0]
    return q, k, v


@fused
def residual_norm(
    tokens: torch.Tensor,
    update: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    update_weight: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    limit: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``tokens`` plus the gated update, and the modulated norm of that sum, both (B, L, D).

    ``gate``, ``shift``, ``scale`` (B, D); without ``scale`` there is no norm. ``update_weight``:
    the update is RMS-normed and its gate's tanh taken (Z-Image). ``norm_weight``: the norm is an
    RMS norm with it, else a layer norm. ``limit``: see ``limited``.
    """
    if update_weight is not None:
        update, gate = rms_norm(update, update_weight, eps), gate.tanh()
    tokens = tokens + update * gate[:, None]
    if limit:
        tokens = limited(tokens)
    if scale is None:
        return tokens, tokens
    if norm_weight is not None:
        return tokens, rms_norm(tokens, norm_weight, eps) * (1 + scale[:, None])
    assert shift is not None
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    return tokens, torch.addcmul(shift[:, None], normed, 1 + scale[:, None])


def limited(x: torch.Tensor) -> torch.Tensor:
    """In fp16, values that overflow are brought back, where ComfyUI does so."""
    if x.dtype != torch.float16:
        return x
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504)


def check_context(context: torch.Tensor, batch: int, width: int, label: str) -> None:
    """Raises InputError unless the text conditioning is of shape (batch, L, width)."""
    if context.ndim != 3 or context.shape[-1] != width:
        raise InputError(
            f"{label} takes a text conditioning of width {width}; got shape "
            f"{tuple(context.shape)}. Use the text encoder that belongs to the model."
        )
    if context.shape[0] != batch:
        raise InputError(f"{batch} latents need as many captions; got {context.shape[0]}.")


def count_blocks(names: Iterable[str], stack: str) -> int:
    """How many blocks ``stack.0.…``, ``stack.1.…``, … there are among the names of tensors."""
    return len({name.split(".")[1] for name in names if name.startswith(f"{stack}.")})


Conditioning = dict[str, Any]  # tensors, and plain data that changes what is computed
# A row-parallel linear and its input (B, L, this rank's features).
Product = tuple[Any, torch.Tensor]
# Puts the ranks' parts of the last axis together: (..., n) on each rank → (..., n · tp_size).
Gather = Callable[[torch.Tensor], torch.Tensor]


class Reduction(Protocol):
    """``DriverBase.join`` with the sum over the ranks inside (``tp_runtime/gpu/reduction.py``)."""

    def __call__(
        self,
        products: Sequence[Product],
        tokens: torch.Tensor,
        gate: torch.Tensor,
        shift: torch.Tensor | None,
        scale: torch.Tensor | None,
        update_weight: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        eps: float,
        limit: bool,
    ) -> torch.Tensor: ...


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


class DriverBase:
    """A sharded module with the forward pass that ComfyUI expects of it, in two halves.

    ``condition`` is what stays the same over a generation (refined text, positions, ...): a
    function of every input but ``timesteps`` and of ``x`` only through its shape. ``step`` is the
    rest: tensors in, one tensor out, so that it can be recorded; ``run_step`` is what runs it.
    """

    label: str
    model: Any
    config: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        config: dict[str, Any],
        gather: Gather,
        reduction: Reduction | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.gather = gather
        self._reduction = reduction
        self.run_step: Callable[..., torch.Tensor] = self.step
        self.memo = Memo()
        self._accepted = set(inspect.signature(self.condition).parameters)

    def condition(self, *args: Any, **inputs: Any) -> Conditioning:
        """The tensors that ``step`` takes besides ``x``, ``timesteps`` and ``control``.

        Raises:
            InputError: a tensor's shape does not fit.
        """
        raise NotImplementedError

    def check_control(
        self, batch: int, conditioning: Conditioning, control: Mapping[str, Any]
    ) -> None:
        """Refuse a ControlNet's residuals that do not fit. Called if ``step`` takes ``control``.

        Raises:
            InputError: a residual is of another shape than it is added to.
        """
        raise NotImplementedError

    def step(self, *args: Any, **inputs: Any) -> torch.Tensor:
        """The model's prediction, of the shape and dtype of ``x``; ``timesteps`` (B,) fp32."""
        raise NotImplementedError

    def join(
        self,
        products: Sequence[Product],
        tokens: torch.Tensor,
        gate: torch.Tensor,
        shift: torch.Tensor | None,
        scale: torch.Tensor | None,
        *,
        update_weight: torch.Tensor | None = None,
        norm_weight: torch.Tensor | None = None,
        eps: float,
        limit: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows row-parallel linears: ``residual_norm`` of each stream's tokens.

        ``products``: for each of S streams, which lie behind one another in ``tokens`` (B, L, D),
        the linear and its input. ``gate``, ``shift``, ``scale`` (S, B, D). Returns the new tokens,
        and their norm, or the tokens again if ``scale`` is None.

        The first result is good for the next ``join`` only: fast, a rank has its own rows of it.
        """
        if self._reduction is not None and optimising():
            normed = self._reduction(
                products, tokens, gate, shift, scale, update_weight, norm_weight, eps, limit
            )
            return tokens, normed
        found = []
        start = 0
        for stream, (linear, x) in enumerate(products):
            found.append(
                residual_norm(
                    tokens[:, start : start + x.shape[1]],
                    linear(x),
                    gate[stream],
                    None if shift is None else shift[stream],
                    None if scale is None else scale[stream],
                    update_weight,
                    norm_weight,
                    eps,
                    limit,
                )
            )
            start += x.shape[1]
        if len(found) == 1:
            return found[0]
        joined, normed = (torch.cat(same, dim=1) for same in zip(*found, strict=True))
        return joined, normed

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

        def condition() -> Conditioning:
            reach("compile")
            return self.condition(**inputs)

        conditioning = self.memo.get(key, condition)
        if per_step:
            self.check_control(x.shape[0], conditioning, **per_step)
        return self.run_step(x=x, timesteps=timesteps, **conditioning, **per_step)
