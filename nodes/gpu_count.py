"""The `gpu_count` input: its choices, and the process group that a choice means on this machine."""

from collections.abc import Callable

from ..tp_runtime import CheckpointInfo, GroupConfig, visible_gpu_count
from .schema import check_choice

AUTO = "auto"
MAX_GPU_COUNT = 8
CHOICES = (AUTO, *(str(count) for count in range(1, MAX_GPU_COUNT + 1)))


def choose_group(choice: str, info: CheckpointInfo, warn: Callable[[str], None]) -> GroupConfig:
    """The group for a model file. Starts nothing; warns where it will be on the CPU.

    Raises:
        SizeError: the model cannot be split that way.
        DeviceError: there are fewer GPUs.
        ValueError: it is none of `CHOICES`.
    """
    check_choice("gpu_count", choice, CHOICES)
    num_visible = visible_gpu_count()
    if choice != AUTO:
        size = int(choice)
        info.check_tp_size(size)
    elif num_visible:
        size = max(info.valid_tp_sizes(limit=min(num_visible, MAX_GPU_COUNT)))
    else:
        size = 1
    group = GroupConfig.local(size)
    if group.device == "cpu":
        ranks = "1 CPU process" if size == 1 else f"{size} CPU processes"
        warn(f"No CUDA GPU is visible: the model runs on {ranks}. Results are right, but slow.")
    return group
