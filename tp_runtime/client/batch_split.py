"""Divides the batches of evaluations over batch groups.

The items of a batch do not depend on one another, so the groups exchange nothing; what a model
looks at of the whole batch, it is given whole.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

Inputs = Mapping[str, Any]
# Of a picture or a video; or of a video and of its sound.
Latents = torch.Tensor | list[torch.Tensor]


def divide(inputs: Inputs, num_parts: int, undivided: Collection[str] = ()) -> list[Inputs]:
    """The inputs of at most ``num_parts`` evaluations, of consecutive items of the batch each.

    ``inputs["x"]``, or each tensor of it, is (batch, ...). A tensor with as many rows is divided
    along them; one with a single row, or without axes, goes to every part as it is, as do the
    inputs that are ``undivided``. The first parts get one item more where the batch cannot be
    divided evenly. A batch with any other tensor stays whole.
    """
    batch = next(tensors_in(inputs["x"])).shape[0]
    num_parts = min(num_parts, batch)
    if num_parts <= 1 or any(_rows(tensor) not in (1, batch) for tensor in tensors_in(inputs)):
        return [inputs]
    sizes = [len(range(part, batch, num_parts)) for part in range(num_parts)]
    starts = [sum(sizes[:part]) for part in range(num_parts)]
    whole = {name: inputs[name] for name in undivided if name in inputs}
    return [
        _narrowed(inputs, batch, start, size, {}) | whole
        for start, size in zip(starts, sizes, strict=True)
    ]


def divide_all(
    inputs_of_each: Sequence[Inputs], batch_groups: int, undivided: Collection[str] = ()
) -> list[list[Inputs]]:
    """The parts of each evaluation, so that all parts together keep the batch groups busy."""
    num_parts = math.ceil(batch_groups / len(inputs_of_each))
    return [divide(inputs, num_parts, undivided) for inputs in inputs_of_each]


def _narrowed(value: Any, batch: int, start: int, size: int, found: dict[int, torch.Tensor]) -> Any:
    """``found``: by identity of the whole tensors; of what is one tensor, the part is one, too."""
    if isinstance(value, torch.Tensor):
        if _rows(value) != batch:
            return value
        return found.setdefault(id(value), value.narrow(0, start, size))
    if isinstance(value, Mapping):
        return {key: _narrowed(item, batch, start, size, found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_narrowed(item, batch, start, size, found) for item in value]
    return value


def _rows(tensor: torch.Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a tree of plain data."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
