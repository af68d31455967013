"""What ComfyUI's process uses: groups, models on them, and what they say.

The nodes import these names and no others. Nothing here imports vLLM, diffusers or
torch.distributed.

::

    Runtime ─ Group ─ Residency ─ Engine ─ RankProcesses ─┬─ GroupState   what the group is now
       └─ RemoteModel                 └─ TensorSender     ├─ Hearing      what the ranks say
                                                          └─ RankEvents   what the owner waits on

**Locks**, in the order in which a thread may take them. Who holds one may take those further down,
and none further up:

1. ``Group._changing``: while a group starts, or what it holds changes; an evaluation holds it until
   its request is sent, so that its model is not put to sleep before. Whoever holds it only tries
   another group's (``Group.give_way``), and does not wait for it.
2. ``Engine._turn``: the caller whose request is under way, until it has the answers or gives up.
3. ``RankProcesses.exchange_in_use``: while the shared memory is written, read or given back.
4. ``GroupState._lock``: while the state changes.

``Users._lock``, ``RankEvents._lock`` and ``Channel._sending`` may be taken at any time, and no
other while one of them is held. ``Group.close`` takes none of the first two: it ends a group
whatever that does, and waits for the owner's thread, which takes only those from the third on.
"""

from ..config import (
    MAX_TP_SIZE,
    MODEL_PATCHES,
    OPTIMIZE,
    PRECISIONS,
    STYLE_TOKENS,
    WEIGHT_DTYPES,
    WHERE,
    GroupConfig,
    Layout,
    ModelSpec,
    Precision,
    file_version,
    ray_address,
    reproducible,
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
from ..files.safetensors_file import DTYPES as STORED_DTYPES
from ..files.safetensors_file import TensorInfo
from ..layouts.choice import choose_layout, nothing_measured
from ..layouts.step_history import Workload
from ..recognise import CheckpointInfo, inspect_checkpoint, open_checkpoint
from ..tools.doctor import Check, examine
from ..wire.protocol import PatchedWeight, WeightPatch
from ..wire.weight_patches import FUNCTIONS as PATCH_FUNCTIONS
from ..wire.weight_patches import KINDS as PATCH_KINDS
from ..wire.weight_patches import PatchError, check_fits, shape_after
from .evaluated import ahead, may_be_ahead, meanwhile, remembered
from .group_report import GroupReport
from .held_tensors import are_equal
from .inspection import checkpoint_info
from .launch.local import prepare_start
from .launch.ray_driver_client import cluster_gpu_count
from .own_python import OwnPython
from .poll import Poll
from .remote_model import RemoteModel
from .remote_patch import RemotePatch
from .runtime import Runtime, get_runtime

__all__ = [
    "MAX_TP_SIZE",
    "MODEL_PATCHES",
    "OPTIMIZE",
    "PATCH_FUNCTIONS",
    "PATCH_KINDS",
    "PRECISIONS",
    "STORED_DTYPES",
    "STYLE_TOKENS",
    "WEIGHT_DTYPES",
    "WHERE",
    "CallTimeoutError",
    "Check",
    "CheckpointError",
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
    "OwnPython",
    "PatchError",
    "PatchedWeight",
    "Poll",
    "Precision",
    "ProtocolError",
    "RankError",
    "RankMemoryError",
    "RemoteModel",
    "RemotePatch",
    "Runtime",
    "SizeError",
    "TPRuntimeError",
    "TensorInfo",
    "WeightPatch",
    "Workload",
    "ahead",
    "are_equal",
    "check_fits",
    "checkpoint_info",
    "choose_layout",
    "cluster_gpu_count",
    "examine",
    "file_version",
    "get_runtime",
    "inspect_checkpoint",
    "may_be_ahead",
    "meanwhile",
    "nothing_measured",
    "open_checkpoint",
    "prepare_start",
    "ray_address",
    "remembered",
    "reproducible",
    "runtime_python",
    "shape_after",
    "visible_gpu_count",
]
