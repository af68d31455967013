"""Makes MODELs that compute on a process group: from a file, or from another such MODEL."""

from collections import OrderedDict

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ..tp_runtime.client import GroupConfig, ModelSpec, checkpoint_info, get_runtime
from .conditions import KEY, calc_cond_batch, outer_sample
from .patcher import TPModelPatcher
from .placement import Placement
from .proxy import RemoteDiffusionModel, is_compiled
from .skeleton import build_skeleton, compute_dtype

KEPT_GROUPS = 2  # of those that samplers have chosen instead of a loader's

# State that a patcher's clones share because they share its model.
_MODEL_STATE = ("model", "backup", "backup_buffers", "object_patches_backup", "pinned")


def load_model(
    path: str,
    dtype: torch.dtype | None,
    group: GroupConfig,
    placement: Placement,
    optimize: str,
    fp8_products: bool = False,
    disable_dynamic: bool = False,  # noqa: ARG001
) -> TPModelPatcher:
    """The MODEL of a file, to run on `group`. Reads the file's header; starts nothing.

    `dtype` is what weights are held in; None: what the stock loader would choose. `placement` is
    what `group` was chosen by: kept for a sampler that asks for another count; the model has its
    precision. `fp8_products`: see `ModelSpec`. ComfyUI passes `disable_dynamic` when it loads a
    model anew; these models are never dynamic.

    Raises:
        CheckpointError, SizeError: the file cannot be used, or not on a group of that size.
    """
    model = build_skeleton(checkpoint_info(path), dtype)
    names = _name(model.get_dtype()), _name(compute_dtype(model))
    spec = ModelSpec.of(path, *names, optimize, fp8_products, placement.precision)
    remote = get_runtime().model(spec, group)
    model.diffusion_model = RemoteDiffusionModel(model.diffusion_model, remote)
    model.tp_placement = placement
    model.tp_on_other_groups = OrderedDict()
    patcher = TPModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, calc_cond_batch)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    patcher.cached_patcher_init = (
        load_model,
        (path, dtype, group, placement, optimize, fp8_products),
    )
    return patcher


def on_group(patcher: TPModelPatcher, group: GroupConfig) -> TPModelPatcher:
    """The same MODEL, patches and options included, to run on another group.

    The model that is made for a group lives as long as the one that it is made from, so that a
    graph which runs again finds its weights loaded. Of several groups, those of the last
    `KEPT_GROUPS`: a group that no MODEL uses ends when another is used next.

    Raises:
        UnsupportedFeatureError: a node has changed the inside of the native model.
    """
    if group == patcher.remote.group_config:
        return patcher
    others: OrderedDict[GroupConfig, TPModelPatcher] = patcher.model.tp_on_other_groups
    if group not in others:
        spec, model = patcher.remote.spec, patcher.model
        others[group] = load_model(
            spec.path,
            model.get_dtype(),
            group,
            model.tp_placement,
            spec.optimize,
            spec.fp8_products,
        )
    patcher.check_code()
    root = others[group]
    others.move_to_end(group)
    while len(others) > KEPT_GROUPS:
        others.popitem(last=False)
    clone = patcher.clone()
    for name in _MODEL_STATE:
        if hasattr(root, name):
            setattr(clone, name, getattr(root, name))
    # What these hold is the loader's model; and compiling it changes nothing.
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    for name in [name for name, value in clone.object_patches.items() if is_compiled(value)]:
        del clone.object_patches[name]
    clone.is_injected = False
    clone.current_hooks = None
    clone.parent = root  # ComfyUI frees through the parent when the clone has gone
    return clone


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
