"""Has the tensors of ComfyUI's conditions on the GPU for a whole sampling.

ComfyUI takes them there at every step, from memory that is not page-locked. Such a copy waits until
the GPU's stream has done what it was given before (CUDA Runtime API, "API synchronization
behavior"): here, until the ranks have computed the step before.
"""

import weakref
from typing import Any, NamedTuple

import torch
from comfy.conds import CONDConstant, CONDRegular

from ..tp_runtime.client import are_equal, may_be_ahead, remembered
from .known_conditions import Conditions, leaves


class _Moved(NamedTuple):
    """A condition that was moved, and what it held then: of tensors on the CPU, copies."""

    there: CONDRegular
    held: list[Any]


def moved_conditions(conds: Conditions, device: torch.device) -> Conditions:
    """The same conditions for `calc_cond_batch`, with tensors of the CPU on the latent's device.

    Within `ahead`, which keeps each as long as the condition lives that it was made of. What lies
    on the CPU is compared at every step with a copy, and moved again if a node has written into it:
    however large it is, since 100 MB take some 5 ms (up to 50 where they do not lie in order), in
    which the ranks compute a step that takes seconds with so large a condition.
    """
    if device.type == "cpu" or not may_be_ahead():
        return conds
    return [None if cond is None else [_entry(one, device) for one in cond] for cond in conds]


def _entry(entry: dict[str, Any], device: torch.device) -> dict[str, Any]:
    model_conds = {name: _moved(one, device) for name, one in entry["model_conds"].items()}
    return entry | {"model_conds": model_conds}


def _moved(cond: Any, device: torch.device) -> Any:
    # Two constants are compared, which would wait for the GPU.
    if not isinstance(cond, CONDRegular) or isinstance(cond, CONDConstant):
        return cond
    of_device = remembered().setdefault((_moved, device), weakref.WeakKeyDictionary())
    moved = of_device.get(cond)
    if moved is None or not _holds_still(cond, moved.held):
        there = cond._copy_with(_on_device(cond.cond, device))
        moved = of_device[cond] = _Moved(there, [_kept(value) for value in leaves(cond.cond)])
    return moved.there


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return [_on_device(item, device) for item in value]
    return value.to(device) if _is_on_cpu(value) else value


def _kept(value: Any) -> Any:
    return value.detach().clone() if _is_on_cpu(value) else value


def _holds_still(cond: CONDRegular, held: list[Any]) -> bool:
    values = list(leaves(cond.cond))
    return len(values) == len(held) and all(map(_is_still, values, held))


def _is_still(value: Any, kept: Any) -> bool:
    """Whether it is what was kept. Of a tensor on a GPU, that itself was kept, and not moved."""
    if not (_is_on_cpu(value) and _is_on_cpu(kept)):
        return value is kept
    return are_equal(value, kept)


def _is_on_cpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cpu
