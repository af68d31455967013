"""What ComfyUI's process uses: groups, models on them, and what they say.

The nodes import these names and no others. Nothing here imports vLLM, diffusers or
torch.distributed.
"""

from ..config import (
    MAX_TP_SIZE,
    OPTIMIZE,
    WHERE,
    GroupConfig,
    Layout,
    ModelSpec,
    file_version,
    ray_address,
    runtime_python,
    visible_gpu_count,
)
from ..errors import (
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
from ..files.checkpoint import CheckpointFile
from ..files.safetensors_file import DTYPES as STORED_DTYPES
from ..files.safetensors_file import TensorInfo
from ..layouts.choice import choose_layout
from ..layouts.step_history import Workload
from ..models.recognise import CheckpointInfo, inspect_checkpoint
from ..tools.doctor import Check, examine
from ..wire.protocol import PatchedWeight, WeightPatch
from ..wire.weight_patches import FUNCTIONS as PATCH_FUNCTIONS
from ..wire.weight_patches import KINDS as PATCH_KINDS
from ..wire.weight_patches import PatchError, check_fits
from .group import GroupReport
from .launch.ray_driver_client import cluster_gpu_count
from .remote_model import RemoteModel
from .runtime import Runtime, get_runtime

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
