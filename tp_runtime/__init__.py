"""Runs diffusion transformers on a background process group, split by tensor parallelism.

This package is used by two kinds of process. ComfyUI's imports these names, which need neither
vLLM nor diffusers; the ranks run ``tp_runtime.worker``. ``ARCHITECTURE.md`` shows the whole.
"""

from .checkpoint import CheckpointFile, CheckpointInfo, inspect_checkpoint
from .config import MAX_TP_SIZE, GroupConfig, ModelSpec, file_version, visible_gpu_count
from .errors import (
    CallTimeoutError,
    CheckpointError,
    DeviceError,
    GroupClosedError,
    GroupDiedError,
    GroupStartError,
    InputError,
    ProtocolError,
    RankError,
    SizeError,
    TPRuntimeError,
)
from .runtime import GroupReport, RemoteModel, Runtime, get_runtime
from .safetensors_file import DTYPES as STORED_DTYPES
from .safetensors_file import TensorInfo

__all__ = [
    "MAX_TP_SIZE",
    "STORED_DTYPES",
    "CallTimeoutError",
    "CheckpointError",
    "CheckpointFile",
    "CheckpointInfo",
    "DeviceError",
    "GroupClosedError",
    "GroupConfig",
    "GroupDiedError",
    "GroupReport",
    "GroupStartError",
    "InputError",
    "ModelSpec",
    "ProtocolError",
    "RankError",
    "RemoteModel",
    "Runtime",
    "SizeError",
    "TPRuntimeError",
    "TensorInfo",
    "file_version",
    "get_runtime",
    "inspect_checkpoint",
    "visible_gpu_count",
]
