"""One step of a sampler, as ComfyUI's `calc_cond_batch` computes it for all conditions.

It is recorded, which `auto` decides by; and where there are batch groups, conditions that ComfyUI
cannot put into one batch are evaluated at the same time instead of one after the other. Not where
nodes have code called for each: it expects to be called by one thread, in ComfyUI's order.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from comfy.model_management import (
    processing_interrupted,
    throw_exception_if_processing_interrupted,
)
from comfy.patcher_extension import CallbacksMP, WrappersMP, get_all_wrappers

from ..tp_runtime.client import RemoteModel, Workload, ahead, meanwhile
from .known_conditions import Conditions, has_code_of_nodes, known_conditions
from .moved_conditions import moved_conditions
from .proxy import sampled
from .together import Meeting

KEY = "tensor_parallel"

# Parts of a condition that it shares with other conditions, or that ComfyUI's own models compute.
_SHARED = ("hooks", "control", "default")


def calc_cond_batch(
    executor: Callable[..., list[torch.Tensor]],
    model: Any,
    conds: Conditions,
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """ComfyUI's wrapper `CALC_COND_BATCH`; same arguments and results as what it wraps.

    It lies in the options of a tensor-parallel model, with which a guider may evaluate any other
    (`DualModelGuider` does): then it only passes on.
    """
    wrappers = get_all_wrappers(WrappersMP.CALC_COND_BATCH, model_options, is_model_options=True)
    remote = remote_of(model)
    if remote is None:
        return executor(model, conds, x_in, timestep, model_options)
    with sampled(remote):
        # More wrappers: another node leaves steps out, or keeps account of conditions.
        if len(wrappers) > 1:
            return executor(model, conds, x_in, timestep, model_options)
        there = moved_conditions(conds, x_in.device)
        workload = functools.partial(_workload, model, conds, x_in)
        with remote.step(workload), known_conditions(remote, there, model_options):
            return _evaluated(remote, executor, model, there, x_in, timestep, model_options)


def _evaluated(
    remote: RemoteModel,
    executor: Callable[..., list[torch.Tensor]],
    model: Any,
    conds: Conditions,
    x_in: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any],
) -> list[torch.Tensor]:
    """What `executor` finds, in one batch or all conditions at the same time."""
    is_apart = (
        remote.group_config.batch_groups > 1
        and _can_be_apart(conds)
        and not has_code_of_nodes(model_options)
        and not model.current_patcher.get_all_callbacks(CallbacksMP.ON_PREPARE_STATE)
    )
    if not is_apart:
        return executor(model, conds, x_in, timestep, model_options)

    def alone(index: int) -> list[torch.Tensor]:
        only = [cond if place == index else None for place, cond in enumerate(conds)]
        return executor(model, only, x_in, timestep, model_options)

    def evaluate_all(asked: Sequence[tuple[Mapping[str, Any], Hashable]]) -> list[Any]:
        inputs, known_as = zip(*asked, strict=True)
        poll = throw_exception_if_processing_interrupted
        return remote.evaluate_all(inputs, poll, known_as=known_as)

    present = [index for index, cond in enumerate(conds) if cond is not None]
    # As many results as conditions; the results of absent ones are zero.
    apart = Meeting(remote).run(
        [functools.partial(alone, index) for index in present], evaluate_all
    )
    results = [torch.zeros_like(x_in) for _ in conds]
    for index, of_one in zip(present, apart, strict=True):
        results[index] = of_one[index]
    return results


def outer_sample(
    executor: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
    callback: Callable[..., object] | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """ComfyUI's wrapper `OUTER_SAMPLE`, of a whole sampling with one guider.

    Within, a step is prepared while the ranks compute the one before. A preview would wait for
    that: it is made while they compute the next.
    """

    def show(*of_step: Any) -> None:
        assert callback is not None
        on_gpu = [value for value in of_step if isinstance(value, torch.Tensor) and value.is_cuda]
        meanwhile(functools.partial(callback, *of_step), *on_gpu)

    shown = None if callback is None else show
    inputs = (noise, latent_image, sampler, sigmas, denoise_mask, shown, *args)
    with ahead(throw_exception_if_processing_interrupted, processing_interrupted):
        return executor(*inputs, **kwargs)


def remote_of(model: Any) -> RemoteModel | None:
    """What a BaseModel computes on; None: it is no tensor-parallel one."""
    remote = getattr(model.diffusion_model, "remote", None)
    return remote if isinstance(remote, RemoteModel) else None


def _can_be_apart(conds: Conditions) -> bool:
    """Whether there are several conditions, of different sizes, with nothing in common."""
    entries = list(_entries(conds))
    if any(entry.get(name) is not None for entry in entries for name in _SHARED):
        return False
    sizes = [
        {name: cond.size() for name, cond in entry["model_conds"].items()} for entry in entries
    ]
    return any(size != sizes[0] for size in sizes)


def _workload(model: Any, conds: Conditions, x_in: torch.Tensor) -> Workload:
    entries = list(_entries(conds))
    batch, *shape = x_in.shape
    packed = getattr(model, "latent_shapes", None) or ()  # since ComfyUI 0.33
    if len(packed) > 1:  # a video's latents and its sound's in one row: the sound's follow from it
        shape = packed[0][1:]
    return Workload((batch * len(entries), *shape), max(map(_text_tokens, entries), default=0))


def _text_tokens(entry: Mapping[str, Any]) -> int:
    text = entry["model_conds"].get("c_crossattn")
    return 0 if text is None else text.cond.shape[1]


def _entries(conds: Conditions) -> Iterator[dict[str, Any]]:
    for cond in conds:
        yield from cond or ()
