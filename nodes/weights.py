"""Patches of weights: from ComfyUI's lists of them to what the ranks apply.

ComfyUI keeps, per weight, a list of (strength, what, strength of the weight, part, function), which
LoRA nodes append to. A merge of models, whose patches are whole weights, cannot travel.
"""

import logging
import zlib
from collections.abc import Mapping
from typing import Any

import comfy.float
import comfy.ops
import comfy.utils
import comfy.weight_adapter
import torch

from ..tp_runtime.client import (
    PATCH_FUNCTIONS,
    PATCH_KINDS,
    CheckpointInfo,
    PatchedWeight,
    PatchError,
    WeightPatch,
    check_fits,
    shape_after,
)
from .unsupported import merged_weights, reshaped_weight, unknown_patch, widened_by_hook

PREFIX = "diffusion_model."
_FUNCTIONS = {
    getattr(comfy.utils, name, None): name for name in PATCH_FUNCTIONS if name is not None
}

# ComfyUI's stochastic rounding to fp8 draws other random numbers where it has comfy-kitchen.
_BY_BYTES: bool = getattr(comfy.float, "_CK_STOCHASTIC_ROUNDING_AVAILABLE", False)
# Its class for the first fp8 files with scales leaves a scale as it is. Releases without that class
# (0.33) read them as today's files, of which a patched weight gets a new one.
_KEEPS_SCALE: bool = hasattr(comfy.ops, "scaled_fp8_ops")

Patches = Mapping[str, list[tuple[Any, ...]]]


def patched_weights(info: CheckpointInfo, *stages: Patches) -> dict[str, PatchedWeight]:
    """What `stages`, one applied after the other, change: name in the file → changes.

    A patch that does not fit its weight is logged and left out, as ComfyUI does; so is one of
    something that is no weight of the model (a table of its sampling, or what nothing uses).

    Raises:
        UnsupportedFeatureError: a model merge, a patch of a kind that is not known, or one that
            makes a weight larger in a way that ComfyUI cannot, either.
        InputError: one makes a weight larger whose shape is fixed.
    """
    found: dict[str, list[tuple[WeightPatch, ...]]] = {}
    seeds: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}  # of weights that are larger than in the file
    for number, stage in enumerate(stages):
        for key, patches in stage.items():
            name = _name_in_file(info, key)
            if name is None:
                logging.warning("The patch of %s is left out: no such weight is used.", key)
                continue
            before = shape = shapes.get(name, info.tensors[name].shape)
            fitting = []
            for patch in patches:
                described, shape = _fitting(_describe(key, patch), name, shape)
                if described is not None:
                    fitting.append(described)
            if shape != before:
                if number > 0:
                    raise widened_by_hook(name, before, shape)
                info.widened(name, shape)
                shapes[name] = shape
            if fitting:
                found.setdefault(name, []).append(tuple(fitting))
                seeds[name] = zlib.crc32(key.encode())  # comfy.model_patcher.string_to_seed
    return {
        name: PatchedWeight(seeds[name], tuple(stages), _BY_BYTES, _KEEPS_SCALE, shapes.get(name))
        for name, stages in found.items()
    }


def patched_by_module(model: torch.nn.Module) -> frozenset[str]:
    """The parameters that ComfyUI patches when it loads a model, module by module.

    It leaves out those of modules that have others below them with parameters, such as tokens to
    pad with (`_load_list` in comfy/model_patcher.py, 0.3.75). Hooks patch these, too.
    """
    found: set[str] = set()
    for path, module in model.named_modules():
        own = {name for name, _ in module.named_parameters(recurse=False)}
        if all(name in own for name, _ in module.named_parameters()):
            found |= {f"{path}.{name}" for name in own}
    return frozenset(found)


def _name_in_file(info: CheckpointInfo, key: str) -> str | None:
    name = key.removeprefix(PREFIX)
    older = f"{name.removesuffix('.weight')}.scale"  # FLUX's norms, which ComfyUI has renamed
    return next((one for one in (name, older) if one in info.sizes.table.file_tensors), None)


def _describe(key: str, patch: tuple[Any, ...]) -> WeightPatch:
    """One entry of ComfyUI's list for the weight `key`."""
    strength, value, strength_model, offset, function = patch
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        if type(value) not in comfy.weight_adapter.adapters or value.name not in PATCH_KINDS:
            raise unknown_patch(key, f"the adapter {type(value).__name__}")
        kind, factors = value.name, tuple(value.weights)
    elif isinstance(value, list):  # another model's weight, with that model's own patches
        raise merged_weights(key)
    elif not isinstance(value, tuple) or len(value) not in (1, 2):
        raise unknown_patch(key, f"a {type(value).__name__} in the place of a patch")
    else:
        kind, factors = ("diff", value) if len(value) == 1 else value
        if kind == "model_as_lora":
            raise merged_weights(key)
        if kind not in PATCH_KINDS:
            raise unknown_patch(key, f"the kind {kind!r}")
    if function is not None and function not in _FUNCTIONS:
        raise unknown_patch(key, f"the function {function}")
    part = None if offset is None else tuple(offset)
    return WeightPatch(
        kind, tuple(factors), float(strength), float(strength_model), part, _FUNCTIONS.get(function)
    )


def _fitting(
    patch: WeightPatch, name: str, shape: tuple[int, ...]
) -> tuple[WeightPatch | None, tuple[int, ...]]:
    """What ComfyUI would do of it, and the shape that the weight then has.

    Where it does not fit, that is only its strength of the weight.
    """
    try:
        return patch, check_fits(patch, shape)
    except PatchError as error:
        if (wanted := shape_after(patch)) is not None:
            raise reshaped_weight(name, shape, wanted, str(error)) from error
        logging.warning("The %s patch of %s is left out: %s", patch.kind, name, error)
        if patch.strength_model == 1.0:
            return None, shape
        return WeightPatch("diff", (), 0.0, patch.strength_model, patch.offset, None), shape
