"""Has the tensors of ComfyUI's conditions on the GPU for a whole sampling.

ComfyUI takes them there at every step, from memory that is not page-locked. Such a copy waits until
the GPU's stream has done what it was given before (CUDA Runtime API, "API synchronization
behavior"): here, until the ranks have computed the step before.
"""

from typing import Any

import torch
from comfy.conds import CONDConstant, CONDRegular

from ..tp_runtime.client import may_be_ahead, remembered
from .known_conditions import Conditions, Itself


def moved_conditions(conds: Conditions, device: torch.device) -> Conditions:
    """The same conditions for `calc_cond_batch`, whose tensors are on the device of the latent.

    Within `ahead`, which keeps them until it ends.
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
    key = _moved, device, Itself(cond), Itself(cond.cond)
    known = remembered()
    if key not in known:
        known[key] = cond._copy_with(_on_device(cond.cond, device))
    return known[key]


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return [_on_device(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value
