"""Runs diffusion transformers on a background process group, split by tensor parallelism.

This package is used by two kinds of process. ComfyUI's imports these names, which need neither
vLLM nor diffusers; the ranks run ``tp_runtime.worker``. ``ARCHITECTURE.md`` shows the whole.
"""

from .checkpoint import CheckpointFile, CheckpointInfo, inspect_checkpoint
from .config import (
    MAX_TP_SIZE,
    OPTIMIZE,
    WHERE,
    GroupConfig,
    ModelSpec,
    file_version,
    ray_address,
    runtime_python,
    visible_gpu_count,
)
from .doctor import Check, examine
from .errors import (
    CallTimeoutError,
    CheckpointError,
    DeviceError,
    GroupClosedError,
    GroupDiedError,
    GroupLostError,
    GroupStartError,
    InputError,
    ProtocolError,
    RankError,
    RankMemoryError,
    SizeError,
    TPRuntimeError,
)
from .group import GroupReport
from .layout import Layout
from .layout_choice import choose_layout
from .protocol import PatchedWeight, WeightPatch
from .ray_cluster import cluster_gpu_count
from .runtime import RemoteModel, Runtime, get_runtime
from .safetensors_file import DTYPES as STORED_DTYPES
from .safetensors_file import TensorInfo
from .step_records import Workload
from .weight_patches import FUNCTIONS as PATCH_FUNCTIONS
from .weight_patches import KINDS as PATCH_KINDS
from .weight_patches import PatchError, check_fits

__all__ = [
    "MAX_TP_SIZE",
    "OPTIMIZE",
    "PATCH_FUNCTIONS",
    "PATCH_KINDS",
    "STORED_DTYPES",
    "WHERE",
    "CallTimeoutError",
    "Check",
    "CheckpointError",
    "CheckpointFile",
    "CheckpointInfo",
    "DeviceError",
    "GroupClosedError",
    "GroupConfig",
    "GroupDiedError",
    "GroupLostError",
    "GroupReport",
    "GroupStartError",
    "InputError",
    "Layout",
    "ModelSpec",
    "PatchError",
    "PatchedWeight",
    "ProtocolError",
    "RankError",
    "RankMemoryError",
    "RemoteModel",
    "Runtime",
    "SizeError",
    "TPRuntimeError",
    "TensorInfo",
    "WeightPatch",
    "Workload",
    "check_fits",
    "choose_layout",
    "cluster_gpu_count",
    "examine",
    "file_version",
    "get_runtime",
    "inspect_checkpoint",
    "ray_address",
    "runtime_python",
    "visible_gpu_count",
]
