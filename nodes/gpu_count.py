"""The `gpu_count` input: its choices, and the process group that a choice means on this machine."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..tp_runtime import (
    WHERE,
    CheckpointInfo,
    DeviceError,
    GroupConfig,
    SizeError,
    choose_layout,
    cluster_gpu_count,
    get_runtime,
    inspect_checkpoint,
    ray_address,
    runtime_python,
    visible_gpu_count,
)
from .layouts import AUTO, possible_layouts
from .schema import check_choice
from .settings import devices_setting, python_setting, ray_address_setting

HERE = WHERE[0]
MAX_GPU_COUNT = 8
CHOICES = (AUTO, *(str(count) for count in range(1, MAX_GPU_COUNT + 1)))


def choose_group(
    choice: str,
    info: CheckpointInfo,
    warn: Callable[[str], None],
    devices: str = "",
    layout: str = AUTO,
    where: str = HERE,
) -> GroupConfig:
    """The group for a model file. Starts nothing.

    Warns where it will be on the CPU, and where 'auto' does not mean as many GPUs as possible.
    `devices`: the GPUs that it may be on, as a person writes them; empty: what the settings allow.

    Raises:
        SizeError: the model cannot be split that way.
        DeviceError: there are fewer GPUs, or `devices` names one that is not there.
        GroupStartError: the Ray cluster cannot be asked.
        ValueError: it is none of `CHOICES`, or `layout` none of `LAYOUTS` or for another count.
    """
    check_choice("gpu_count", choice, CHOICES)
    check_choice("where", where, WHERE)
    if where == "ray":
        return _on_ray(choice, info, warn, devices, layout)
    gpus, shown_by = _usable_gpus(devices)
    count = None if choice == AUTO else int(choice)
    layouts = possible_layouts(layout, count, info, max(len(gpus), 1))
    _check_enough(layouts[0].num_gpus, gpus, shown_by)
    chosen = choose_layout(info, layouts, gpus, get_runtime().records)
    if chosen.reason:
        warn(chosen.reason)
    size, batch_groups = chosen.layout.tp_size, chosen.layout.batch_groups
    num_ranks = chosen.layout.num_gpus
    group = GroupConfig.local(size, gpus[:num_ranks] or None, batch_groups)
    if group.device == "cpu":
        ranks = "1 CPU process" if num_ranks == 1 else f"{num_ranks} CPU processes"
        warn(f"No CUDA GPU is visible: the model runs on {ranks}. Results are right, but slow.")
    return dataclasses.replace(group, python=runtime_python(python_setting()))


def _on_ray(
    choice: str, info: CheckpointInfo, warn: Callable[[str], None], devices: str, layout: str
) -> GroupConfig:
    """`choose_group` for the cluster. Ray chooses the GPUs, so no times are known of them."""
    address = ray_address(ray_address_setting())
    python = runtime_python(python_setting())
    if devices.strip():
        raise DeviceError(
            f"devices is {devices!r}, but Ray chooses the GPUs of its cluster. Clear it, or set "
            f"where to {HERE!r}."
        )
    num_gpus, cluster = _gpus_on_ray(address, python)
    count = None if choice == AUTO else int(choice)
    chosen = possible_layouts(layout, count, info, max(num_gpus, 1))[0]
    _check_enough(chosen.num_gpus, tuple(range(num_gpus)), f"{cluster} has")
    if not num_gpus:
        warn(
            f"{cluster} has no GPUs: the model runs in CPU processes. Results are right, but slow."
        )
    return GroupConfig(
        chosen.tp_size,
        "cuda" if num_gpus else "cpu",
        batch_groups=chosen.batch_groups,
        python=python,
        where="ray",
        ray_address=address,
    )


def _gpus_on_ray(address: str, python: str) -> tuple[int, str]:
    """How many GPUs the cluster has, and what to call it."""
    if not address:
        return visible_gpu_count(), "Ray on this machine"
    return cluster_gpu_count(address, python), f"the Ray cluster at {address}"


def refused_counts(path: str | None, devices: str = "", where: str = HERE) -> dict[str, Any]:
    """The counts that do not work, each with why; `path` None: for any model.

    Raises:
        CheckpointError: the file cannot be used.
        DeviceError: `devices`, or the setting, names a GPU that is not there.
    """
    info = None if path is None else inspect_checkpoint(path)
    if where == "ray":
        address, python = ray_address(ray_address_setting()), runtime_python(python_setting())
        num_gpus, cluster = _gpus_on_ray(address, python)
        gpus, shown_by = tuple(range(num_gpus)), f"{cluster} has"
    else:
        gpus, shown_by = _usable_gpus(devices)
    refused = {}
    for count in range(1, MAX_GPU_COUNT + 1):
        try:
            if info is not None:
                info.check_tp_size(count)
            _check_enough(count, gpus, shown_by)
        except (SizeError, DeviceError) as error:
            refused[str(count)] = str(error)
    return {"num_gpus": len(gpus), "refused": refused}


def _usable_gpus(devices: str) -> tuple[tuple[int, ...], str]:
    """The GPUs of `devices`, else of the settings, else all; and where they are said to be.

    None on a machine without GPUs.
    """
    for name, text in (("devices", devices), ("the setting 'GPUs to use'", devices_setting())):
        if text.strip():
            return _listed_gpus(name, text), f"{name} lists"
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


def _check_enough(count: int, gpus: tuple[int, ...], shown_by: str) -> None:
    """Raises DeviceError if there are fewer GPUs. Without any, CPU processes take their place."""
    if gpus and count > len(gpus):
        shown = ", ".join(map(str, gpus))
        raise DeviceError(
            f"{count} GPUs were asked for, but {shown_by} {len(gpus)} ({shown}). "
            f"Choose at most {len(gpus)}, or 'auto'."
        )
