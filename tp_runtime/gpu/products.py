"""Products with a rank's part of a weight, as few kernels as cuBLAS has them. GPUs only.

The tokens of one stream of several pictures lie apart, behind those of another stream. torch's
linear then copies them together and adds the bias in a pass of its own; here each picture is a
product, with the bias, and GELU, in it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from .streaming import StreamedLinearMethod


def multiply(
    linear: LinearBase,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    gelu: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """This rank's ``linear(x)`` with ``bias``, (B, L, features) → (B, L, D); into ``out`` if given.

    ``gelu``: GELU, by tanh, of that.
    """
    method = linear.quant_method
    if isinstance(method, StreamedLinearMethod):
        with method.at_hand(linear):
            return _multiply(linear, method.method, x, bias, gelu, out)
    return _multiply(linear, method, x, bias, gelu, out)


def _multiply(
    linear: LinearBase,
    method: Any,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if type(method) is not UnquantizedLinearMethod:
        found = method.apply(linear, x, bias)
        if gelu:
            found = F.gelu(found, approximate="tanh")
        return found if out is None else out.copy_(found)
    weight = linear.weight.t()
    if out is None:
        out = x.new_empty(*x.shape[:2], weight.shape[1])
    pictures, places = x, out
    if x.is_contiguous() and out.is_contiguous():
        pictures, places = x.flatten(0, 1)[None], out.flatten(0, 1)[None]
    for rows, place in zip(pictures, places, strict=True):
        if gelu and x.is_cuda:  # elsewhere torch's is GELU by erf
            added = _zeros(weight.shape[1], x.dtype, x.device) if bias is None else bias
            torch._addmm_activation(added, rows, weight, use_gelu=True, out=place)
            continue
        if bias is None:
            torch.mm(rows, weight, out=place)
        else:
            torch.addmm(bias, rows, weight, out=place)
        if gelu:
            place.copy_(F.gelu(place, approximate="tanh"))
    return out


def is_plain(linear: LinearBase) -> bool:
    """Whether its weight is neither quantised nor streamed: a part of its rows is a linear, too."""
    return type(linear.quant_method) is UnquantizedLinearMethod


def multiply_apart(
    linear: LinearBase, x: torch.Tensor, width: int
) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    """The first ``width`` features of this rank's ``linear(x)``, and what computes the others.

    (B, L, features) → (B, L, D); of a linear that ``is_plain``.
    """

    def product(rows: slice) -> torch.Tensor:
        bias = None if linear.bias is None else linear.bias[rows]
        return F.linear(x, linear.weight[rows], bias)

    return product(slice(width)), lambda: product(slice(width, None))


@functools.cache  # recorded graphs read it
def _zeros(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype, device=device)
