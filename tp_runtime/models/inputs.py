"""The inputs of an evaluation against what the model's family declares, before anything is sent.

A rank that fails in the middle of an evaluation leaves the others waiting in a collective, so its
group has to end. What can be known of the inputs is therefore checked by who asks.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError
from .family import AtLeast, Axis, Input, Sizes

OPTIONS = "transformer_options"


def checked_inputs(
    label: str, sizes: Sizes, inputs: Mapping[str, Any], compute_dtype: str
) -> Mapping[str, Any]:
    """The inputs that the model computes with: neither absent ones (None), nor unused ones.

    As the forward on the ranks takes them (``Sizes.prepared``).

    Raises:
        InputError: one is unknown, missing, no tensor, or of another shape, axes or dtype than
            declared.
    """
    given = {
        name: value
        for name, value in inputs.items()
        if value is not None and name not in sizes.unused_inputs
    }
    declared = sizes.all_inputs
    unknown = sorted(given.keys() - declared.keys() - {*sizes.plain_inputs, OPTIONS})
    if unknown:
        raise InputError(
            f"{label} on the process group does not support the model input {', '.join(unknown)}. "
            "Remove the node that sets it, or load the model with the stock 'Load Diffusion Model' "
            "node."
        )
    lengths: dict[str, int] = {}
    for name, one in declared.items():
        if name not in given:
            if not one.optional:
                raise InputError(
                    f"{label} needs the model input {name}. Use the conditioning of the text "
                    "encoder that belongs to the model, and the nodes that its template has."
                )
            continue
        tensors = _tensors(label, name, one, given[name])
        if one.at_most is not None and len(tensors) > one.at_most:
            raise InputError(
                f"{label} takes up to {one.at_most} {one.what.lower()}; got {len(tensors)}. Remove "
                "some of the nodes that add them."
            )
        for each, tensor in tensors:
            _check_kind(label, each, tensor, compute_dtype)
            named = _named_axes(label, each, tensor, lengths)
            if name == "x":
                lengths = named | lengths
    return sizes.prepared(given)


def _tensors(
    label: str, name: str, declared: Input, value: Any
) -> list[tuple[Input, torch.Tensor]]:
    """The tensors of an input, each with its declaration."""
    each, what = [declared, *declared.besides], "a tensor"
    if declared.besides:
        what = f"a list of {len(each)} tensors ({', '.join(one.what.lower() for one in each)})"
    elif declared.many:
        what = "a list of tensors"
    is_list = isinstance(value, list | tuple)
    tensors = list(value) if is_list and (declared.many or declared.besides) else [value]
    if declared.many:
        each = len(tensors) * each
    strange = [one for one in tensors if not isinstance(one, torch.Tensor)]
    least = len(each) - sum(one.optional for one in declared.besides)
    if strange or not least <= len(tensors) <= len(each):
        got = type(strange[0]).__name__ if strange else f"{len(tensors)} of them"
        raise InputError(
            f"{declared.what} of {label} (the model input {name}) must be {what}; got {got}. "
            f"{_advice(declared)}"
        )
    return list(zip(each, tensors, strict=False))


def _check_kind(label: str, declared: Input, tensor: torch.Tensor, compute_dtype: str) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    fits = {
        "computed": dtype == compute_dtype,
        "number": tensor.is_floating_point(),
        "mask": dtype in ("bool", compute_dtype),
        "any": True,
    }[declared.kind]
    if not fits:
        allowed = {"computed": compute_dtype, "number": "a float dtype"}
        raise InputError(
            f"{declared.what} of {label} must be in "
            f"{allowed.get(declared.kind, f'bool or {compute_dtype}')} here; got {dtype}. They "
            "come from a node between the loader and the sampler: remove it."
        )
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        raise InputError(
            f"{declared.what} of {label} must be a usual tensor; got one with the layout "
            f"{tensor.layout} on the device {tensor.device}. Remove the node that makes it."
        )


def _named_axes(
    label: str, declared: Input, tensor: torch.Tensor, lengths: Mapping[str, int]
) -> dict[str, int]:
    """The axes of a tensor by name. Raises InputError if they are not as declared."""
    shape = tuple(tensor.shape)
    if not declared.axes:
        return {}
    axes = declared.axes
    if declared.or_axes and len(shape) == len(declared.or_axes):
        axes = declared.or_axes
    if len(shape) != len(axes) or not all(map(_axis_fits, axes, shape)):
        raise InputError(
            f"{declared.what} of {label} have the shape {declared}; got {shape}. "
            f"{_advice(declared)}"
        )
    pairs = zip(axes, shape, strict=True)
    named = {axis: length for axis, length in pairs if isinstance(axis, str)}
    for axis, length in named.items():
        if lengths.get(axis, length) == length:
            continue
        if axis == "batch":
            raise InputError(
                f"{lengths[axis]} latents need as many {declared.what.lower()}; got {length}. "
                f"{_advice(declared)}"
            )
        raise InputError(
            f"{declared.what} of {label} have the shape {declared}, here with {axis} "
            f"{lengths[axis]}; got {shape}. {_advice(declared)}"
        )
    return named


def _advice(declared: Input) -> str:
    return declared.advice or "Remove the node that sets them."


def _axis_fits(axis: Axis, length: int) -> bool:
    if isinstance(axis, AtLeast):
        return length >= axis.length
    return length > 0 if isinstance(axis, str) else length == axis[1]
