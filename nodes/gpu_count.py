"""The `gpu_count` input: its choices, and the process group that a choice means on this machine."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from ..tp_runtime.client import (
    WHERE,
    CheckpointError,
    CheckpointInfo,
    DeviceError,
    GroupConfig,
    Layout,
    Poll,
    SizeError,
    checkpoint_info,
    choose_layout,
    cluster_gpu_count,
    file_version,
    get_runtime,
    nothing_measured,
    ray_address,
    runtime_python,
    visible_gpu_count,
)
from .layouts import EXPLICIT, possible_layouts
from .placement import AUTO, HERE, Placement
from .schema import check_choice
from .settings import devices_setting, python_setting, reproducible_setting
from .skeleton import build_skeleton

MAX_GPU_COUNT = 8
_KEPT = 64  # files of which it is remembered whether this ComfyUI knows their model
CHOICES = (AUTO, *(str(count) for count in range(1, MAX_GPU_COUNT + 1)))


def choose_group(
    placement: Placement,
    info: CheckpointInfo,
    warn: Callable[[str], None],
    poll: Poll | None = None,
    weight_dtype: torch.dtype | None = None,
) -> GroupConfig:
    """The group for a model file. Starts nothing; `poll` is called while a cluster is asked.

    `weight_dtype`: what the weights are to be held in; None: what the file has.

    Warns where it will be on the CPU, and where 'auto' does not mean as many GPUs as possible.

    Raises:
        SizeError: the model cannot be split that way.
        DeviceError: there are fewer GPUs, or `devices` names one that is not there.
        GroupStartError: the Ray cluster cannot be asked.
        ValueError: `gpu_count` is none of `CHOICES`, `where` none of `WHERE`, or `layout` none of
            `LAYOUTS` or for another count.
    """
    check_choice("gpu_count", placement.gpu_count, CHOICES)
    check_choice("where", placement.where, WHERE)
    gpus, shown_by = _gpus_for(placement, poll)
    count = None if placement.gpu_count == AUTO else int(placement.gpu_count)
    layouts = possible_layouts(placement.layout, count, info, max(len(gpus), 1))
    _check_enough(layouts[0].num_gpus, gpus, shown_by, placement.layout)
    if placement.where == "ray":
        return _on_ray(layouts[0], bool(gpus), warn)
    is_reproducible = reproducible_setting()
    runtime = get_runtime()
    records = runtime.records, runtime.links
    if is_reproducible:  # predictions for such GPUs, and nothing that was measured
        records = nothing_measured()
    itemsize = None if weight_dtype is None else weight_dtype.itemsize
    chosen = choose_layout(info, layouts, gpus, *records, placement.precision, itemsize)
    if chosen.reason:
        warn(chosen.reason)
    num_ranks = chosen.layout.num_gpus
    group = GroupConfig.of_layout(chosen.layout, chosen.gpus or None)
    if group.device == "cpu":
        ranks = "1 CPU process" if num_ranks == 1 else f"{num_ranks} CPU processes"
        warn(f"No CUDA GPU is visible: the model runs on {ranks}. Results are right, but slow.")
    python = runtime_python(python_setting())
    return dataclasses.replace(group, python=python, reproducible=is_reproducible)


def _on_ray(layout: Layout, on_gpus: bool, warn: Callable[[str], None]) -> GroupConfig:
    """A group on the cluster. No times are known of its GPUs, which Ray chooses."""
    if not on_gpus:
        warn("Ray has no GPUs: the model runs in CPU processes. Results are right, but slow.")
    return GroupConfig(
        layout.tp_size,
        "cuda" if on_gpus else "cpu",
        batch_groups=layout.batch_groups,
        sequence_size=layout.sequence_size,
        python=runtime_python(python_setting()),
        where="ray",
        ray_address=ray_address(),
        reproducible=reproducible_setting(),
    )


def refused_counts(path: str | None, placement: Placement) -> dict[str, Any]:
    """The counts that do not work there, each with why, and the reasons, each with its counts.

    `path` None: for any model.

    Raises:
        CheckpointError: the file cannot be used, or not by this ComfyUI: what a loader would raise.
        DeviceError: `devices`, or the setting, names a GPU that is not there.
    """
    info = None if path is None else checkpoint_info(path)
    if info is not None and (refusal := _refusal_of_comfyui(info.path, file_version(info.path))):
        raise CheckpointError(refusal)
    gpus, shown_by = _gpus_for(placement)
    refused: dict[str, str] = {}
    why: dict[str, list[int]] = {}
    for count in range(1, MAX_GPU_COUNT + 1):
        if found := _why_not(count, info, placement.layout, gpus, shown_by):
            refused[str(count)], of_several = found
            why.setdefault(of_several, []).append(count)
    return {
        "num_gpus": len(gpus),
        "refused": refused,
        "why": [{"counts": counts, "reason": reason} for reason, counts in why.items()],
    }


def _why_not(
    count: int, info: CheckpointInfo | None, layout: str, gpus: tuple[int, ...], shown_by: str
) -> tuple[str, str] | None:
    """Why a count does not work: in full, and so that it holds for others, too. None: it does."""
    of_layout = Layout.parse(layout).num_gpus if layout in EXPLICIT else None
    try:
        if of_layout is not None:  # it is too large for any count, or for none
            _check_enough(of_layout, gpus, shown_by, layout)
        if info is not None:
            possible_layouts(layout, count, info, count)
        _check_enough(count, gpus, shown_by, AUTO)
    except SizeError as error:
        assert info is not None
        of_several = f"{info.label} would need too much padding."
        return str(error), of_several if of_layout is None else str(error)
    except DeviceError as error:
        shown = ", ".join(map(str, gpus))
        num_gpus = "1 GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        of_several = f"{shown_by[0].upper()}{shown_by[1:]} {num_gpus} ({shown})."
        return str(error), of_several if of_layout is None else str(error)
    except ValueError as error:
        return str(error), f"The layout {layout} takes {of_layout} GPUs."
    return None


@functools.lru_cache(_KEPT)
def _refusal_of_comfyui(path: str, _version: tuple[int, int]) -> str:
    """Why this ComfyUI cannot build the file's model; empty: it can. Pages ask many times."""
    try:
        build_skeleton(checkpoint_info(path), torch.bfloat16)
    except CheckpointError as error:
        return str(error)
    return ""


def _gpus_for(placement: Placement, poll: Poll | None = None) -> tuple[tuple[int, ...], str]:
    """The GPUs to choose from, and who says that there are these.

    Without any, the model runs in CPU processes.
    """
    if placement.where != "ray":
        return _usable_gpus(placement.devices)
    if placement.devices.strip():
        raise DeviceError(
            f"devices is {placement.devices!r}, but Ray chooses the GPUs of its cluster. Clear it, "
            f"or set where to {HERE!r}."
        )
    address = ray_address()
    if not address:
        return tuple(range(visible_gpu_count())), "Ray on this machine has"
    num_gpus = cluster_gpu_count(address, runtime_python(python_setting()), poll)
    return tuple(range(num_gpus)), f"the Ray cluster at {address} has"


def _usable_gpus(devices: str) -> tuple[tuple[int, ...], str]:
    """The GPUs of `devices`, else of the settings, else all; and who says that there are these."""
    for name, text in (("devices", devices), ("The setting 'GPUs to use'", devices_setting())):
        if text.strip():
            return _listed_gpus(name, text), f"{name[0].lower()}{name[1:]} lists"
    return tuple(range(visible_gpu_count())), "this machine shows"


def _listed_gpus(name: str, devices: str) -> tuple[int, ...]:
    """The GPUs of a text such as "0,2,3", in that order."""
    visible = visible_gpu_count()
    if not visible:
        raise DeviceError(
            f"{name} is {devices!r}, but no CUDA GPU is visible. Clear it to use the CPU."
        )
    parts = [part.strip() for part in devices.split(",")]
    problem = None
    if not all(part.isdecimal() for part in parts):
        problem = "give numbers with commas between them, such as 0,2,3"
    elif len({int(part) for part in parts}) != len(parts):
        problem = "name every GPU once"
    elif any(int(part) >= visible for part in parts):
        problem = f"this machine shows the GPUs 0 to {visible - 1} to ComfyUI"
    if problem:
        raise DeviceError(f"{name} is {devices!r}: {problem}. Empty means all of them.")
    return tuple(map(int, parts))


def _check_enough(count: int, gpus: tuple[int, ...], shown_by: str, layout: str) -> None:
    """Raises DeviceError if there are fewer GPUs. Without any, CPU processes take their place."""
    if gpus and count > len(gpus):
        shown = ", ".join(map(str, gpus))
        if layout in EXPLICIT:
            raise DeviceError(
                f"layout is {layout!r}, which takes {count} GPUs, but {shown_by} {len(gpus)} "
                f"({shown}). Set layout to 'auto', and gpu_count to at most {len(gpus)} or 'auto'."
            )
        raise DeviceError(
            f"{count} GPUs were asked for, but {shown_by} {len(gpus)} ({shown}). "
            f"Choose at most {len(gpus)}, or 'auto'."
        )
