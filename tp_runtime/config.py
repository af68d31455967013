"""Settings of a process group and of a model on it. Every process reads them; none changes them.

With ``settings``, the only place where the package reads environment variables of its own:

=============================  ==========================================================
``TP_RUNTIME_PYTHON``          Python that runs the ranks (default: the running one)
``TP_RUNTIME_START_TIMEOUT``   seconds until a starting group, or before it the imports that it
                               waits for, is given up (default 300)
``TP_RUNTIME_CALL_TIMEOUT``    seconds until a computing group is given up (default 600);
                               less in evaluations whose time is known (``evaluation_times``)
``TP_RUNTIME_HOST_RESERVE``    share of the memory, of the host or its container, that sleeping
                               models leave free (default 0.125)
``TP_RUNTIME_GPU_MEMORY``      GiB that a model's weights may take on each GPU; the rest stays in
                               the host's memory and is read at every use (default: what the GPU
                               has, less room)
``TP_RUNTIME_ATTENTION``       the ranks' attention on GPUs: auto (measured; the default), fixed
                               (flash3 if the GPU has it, else cudnn), flash3, cudnn, or sdpa
                               (torch's choice)
``TP_RUNTIME_REPRODUCIBLE``    on: the layout and the attention kernel follow from the model and the
                               GPUs alone, not from what was measured (default: the setting, off)
``TP_RUNTIME_QUANTISED_PRODUCTS``  off: GPUs multiply with dequantised weights, also where they
                               can multiply in int8 and fp8 (default: on)
``TP_RUNTIME_FAMILIES``        packages with more families of models, by spaces; on the PYTHONPATH
``TP_RUNTIME_LOG_LEVEL``       level of the ranks' logs (default INFO)
``TP_RUNTIME_RAY_ADDRESS``     Ray cluster, host:port, for groups that run on one (default:
                               one that is started on this machine for each group)
``TP_RUNTIME_TEST_FAULTS``     tests only: a file of faults that ranks have (``fault_points``)
``TP_RUNTIME_TEST_ONE_GPU``    tests only: so many ranks share the first GPU (NCCL 2.30 or newer;
                               what a step takes means nothing then)
``TP_RUNTIME_HOME``            folder for logs and what ranks compile
                               (default: the user's state folder)
=============================  ==========================================================
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import msgspec

from .errors import CheckpointError, DeviceError, TPRuntimeError
from .reasons import printable
from .settings import PACKAGE as PACKAGE
from .settings import home as home
from .settings import runtime_python as runtime_python

MAX_TP_SIZE = 8
MAX_RANKS = 64
# Exchanges that the heads of an attention go in at most, where these pass through the host's
# memory; and what a rank gives each other one in one of them at least. On four H200s FLUX.1 at
# 1024² takes 100.0 ms in four turns of 1.3 MB, and 89.7 in two of 2.7 MB.
EXCHANGE_TURNS = 4
LEAST_TURN_BYTES = 2**21
# Room to be left beside a model on every device, as ComfyUI leaves it (model_management.py).
ROOM_FACTOR = 1.1
ROOM_BYTES = 2**30


def exchange_turns(num_bytes: float, most: int = EXCHANGE_TURNS) -> int:
    """In how many exchanges heads go of which a rank gives each other one so many bytes."""
    return max(1, min(most, int(num_bytes // LEAST_TURN_BYTES)))


def _number(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise TPRuntimeError(f"{name}={text!r}: give a number of seconds above 0.")
    return value


def gpu_memory() -> int:
    """Bytes that a model's weights may take on each device; 0: as many as fit."""
    text = os.environ.get("TP_RUNTIME_GPU_MEMORY", "")
    try:
        gib = float(text or 0)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < math.inf or (text and not gib):
        raise TPRuntimeError(
            f"TP_RUNTIME_GPU_MEMORY={text!r}: give GiB above 0, such as 7.5, or leave it unset."
        )
    return int(gib * 2**30)


def fitting_weights(total_bytes: int, computed_bytes: float = 0) -> int:
    """Bytes of weights for which a device with so much memory has room, if it is empty.

    ``computed_bytes``: what a step needs there beside them, if that is known; two processes, the
    rank's and ComfyUI's, then have ``ROOM_BYTES`` each.
    """
    beside_all = (total_bytes - ROOM_BYTES) / ROOM_FACTOR
    return max(0, int(min(beside_all, total_bytes - 2 * ROOM_BYTES - computed_bytes)))


def ray_address() -> str:
    """The Ray cluster's address; empty: Ray is started here.

    Of the environment only: settings of the page arrive over the network.
    """
    return os.environ.get("TP_RUNTIME_RAY_ADDRESS", "")


def log_level() -> str:
    """Level of the ranks' logs, as ``logging`` spells it."""
    level = os.environ.get("TP_RUNTIME_LOG_LEVEL", "INFO").upper()
    allowed = ("DEBUG", "INFO", "WARNING", "ERROR")
    if level not in allowed:
        raise TPRuntimeError(f"TP_RUNTIME_LOG_LEVEL={level!r}: use one of {', '.join(allowed)}.")
    return level


AttentionKernel = Literal["auto", "fixed", "flash3", "cudnn", "sdpa"]


def attention_kernel() -> AttentionKernel:
    """The kernel that optimised evaluations use for attention."""
    name = os.environ.get("TP_RUNTIME_ATTENTION", "auto").lower()
    for allowed in get_args(AttentionKernel):
        if name == allowed:
            return allowed
    raise TPRuntimeError(
        f"TP_RUNTIME_ATTENTION={name!r}: use one of {', '.join(get_args(AttentionKernel))}."
    )


def quantised_products() -> bool:
    """Whether GPUs multiply quantised weights in int8 and fp8, if they can."""
    return _switch("TP_RUNTIME_QUANTISED_PRODUCTS", preferred=True)


def reproducible(preferred: bool) -> bool:
    """Whether what was measured decides nothing: the environment's word, else ``preferred``."""
    return _switch("TP_RUNTIME_REPRODUCIBLE", preferred)


def _switch(variable: str, preferred: bool) -> bool:
    chosen = os.environ.get(variable, "on" if preferred else "off").lower()
    if chosen not in ("on", "off"):
        raise TPRuntimeError(f"{variable}={chosen!r}: use on or off.")
    return chosen == "on"


def family_packages() -> list[str]:
    """Importable packages with a family of models each, beside the built-in ones."""
    return os.environ.get("TP_RUNTIME_FAMILIES", "").split()


def fault_file() -> str:
    """Where a test asks for faults of the ranks (``fault_points``); empty: there are none."""
    return os.environ.get("TP_RUNTIME_TEST_FAULTS", "")


def ranks_on_one_gpu() -> int:
    """Of how many GPUs the first one plays the part, for tests of what groups compute; 0: of none.

    Each rank is a process of its own on it. Sums go through NCCL, which allows that since 2.30
    (``NCCL_MULTI_RANK_GPU_ENABLE``); through memory that the ranks share, as where NVLink connects
    the GPUs, if ``TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1`` (torch) is set.
    """
    return int(os.environ.get("TP_RUNTIME_TEST_ONE_GPU", "0"))


def host_reserve() -> float:
    """Share of the memory, 0 to 1, that models which sleep there must leave free."""
    text = os.environ.get("TP_RUNTIME_HOST_RESERVE", "0.125")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise TPRuntimeError(f"TP_RUNTIME_HOST_RESERVE={text!r}: give a share from 0 to 1.")
    return share


def visible_gpu_count() -> int:
    """Number of CUDA devices that this process may use. Creates no CUDA context."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count and (ranks_on_one_gpu() or count)


def may_access_peers() -> bool:
    """Whether GPUs may read each other's memory where they can: not where NCCL was told not to.

    People set ``NCCL_P2P_DISABLE`` where that is broken; then it is for our kernels, too.
    """
    return os.environ.get("NCCL_P2P_DISABLE", "0") in ("", "0")


def cuda_index(gpu: int) -> int:
    """The number that CUDA gives to a visible GPU."""
    return 0 if ranks_on_one_gpu() else gpu


def device_name(gpu: int | None) -> str:
    """The product name of a visible GPU; ``"cpu"`` for None."""
    import torch

    return "cpu" if gpu is None else torch.cuda.get_device_name(cuda_index(gpu))


def device_names(gpus: Iterable[int]) -> str:
    """The product names of visible GPUs, each once; ``"cpu"`` without any."""
    return " and ".join(dict.fromkeys(map(device_name, gpus))) or device_name(None)


def gpu_names(gpus: Iterable[int]) -> list[str]:
    """Number and product name of visible GPUs, by which the machine's GPUs are told apart."""
    return [f"{gpu} {device_name(gpu)}" for gpu in gpus]


@dataclass(frozen=True, order=True)
class Layout:
    """``tp_size`` GPUs for each of so many copies of the model.

    ``sequence_size`` copies share the tokens of an evaluation; ``batch_groups`` such groups
    evaluate different items of a batch.
    """

    tp_size: int
    batch_groups: int = 1
    sequence_size: int = 1

    @property
    def num_gpus(self) -> int:
        return self.tp_size * self.sequence_size * self.batch_groups

    def __str__(self) -> str:
        sequence = "" if self.sequence_size == 1 else f"x{self.sequence_size}"
        return f"{self.tp_size}{sequence}x{self.batch_groups}"

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """The layout that ``str`` gave. Raises ValueError."""
        sizes = [int(size) if size.isdecimal() else 0 for size in text.split("x")]
        if len(sizes) not in (2, 3) or not all(sizes):
            raise ValueError(
                f"layout={text!r}: write TP size x batch groups, such as 2x2, or TP size x "
                "sequence size x batch groups, such as 2x2x1."
            )
        tp_size, *sequence_size, batch_groups = sizes
        return cls(tp_size, batch_groups, *sequence_size)


Where = Literal["this machine", "ray"]
WHERE: tuple[Where, ...] = get_args(Where)


@dataclass(frozen=True)
class GroupConfig:
    """What identifies a process group: two equal configs share one group.

    Its ranks form tensor-parallel groups of ``tp_size`` consecutive ranks, each of which holds the
    whole model. ``sequence_size`` of them, one behind another, share the tokens of an evaluation;
    each of the ``batch_groups`` of these computes a part of a forward batch.

    ``devices`` are indices among the CUDA devices visible to this process, one per rank;
    empty on CPU, and on Ray, which chooses them. Timeouts are in seconds. ``ray_address``: the
    cluster's, ``host:port``; empty: one is started on this machine. ``reproducible``: attention is
    computed by a kernel that was not chosen by its speed. ``gpu_memory``: bytes that the weights of
    a model may take on each device; 0: as many as fit.
    """

    tp_size: int
    device: Literal["cuda", "cpu"]
    devices: tuple[int, ...] = ()
    batch_groups: int = 1
    sequence_size: int = 1
    python: str = field(default_factory=runtime_python)
    start_timeout_s: float = field(
        default_factory=lambda: _number("TP_RUNTIME_START_TIMEOUT", 300.0)
    )
    call_timeout_s: float = field(default_factory=lambda: _number("TP_RUNTIME_CALL_TIMEOUT", 600.0))
    where: Where = "this machine"
    ray_address: str = ""
    reproducible: bool = False
    gpu_memory: int = field(default_factory=gpu_memory)

    def __post_init__(self) -> None:
        if not 1 <= self.tp_size <= MAX_TP_SIZE:
            raise DeviceError(f"A TP size of {self.tp_size}: choose 1 to {MAX_TP_SIZE}.")
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise DeviceError(f"A group of {self.num_ranks} ranks: choose 1 to {MAX_RANKS}.")
        self._check_where()
        if (
            self.device == "cuda"
            and self.where == "this machine"
            and not (len(self.devices) == len(set(self.devices)) == self.num_ranks)
        ):
            raise DeviceError(
                f"{self.num_ranks} ranks need as many different GPUs; got devices {self.devices}."
            )
        if self.device == "cpu" and self.devices:
            raise DeviceError(f"CPU ranks take no GPUs; got devices {self.devices}.")
        for name in ("start_timeout_s", "call_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise TPRuntimeError(f"{name}={getattr(self, name)}: give seconds above 0.")

    def _check_where(self) -> None:
        if self.where not in WHERE:
            raise DeviceError(f"where={self.where!r}: use one of {', '.join(WHERE)}.")
        if self.where == "ray" and self.devices:
            raise DeviceError(
                f"GPUs {self.devices} were asked for, but Ray chooses the GPUs of its cluster. "
                "Leave 'devices' empty, or set 'where' to 'this machine'."
            )
        host, _, port = self.ray_address.rpartition(":")
        if self.ray_address and not (self.where == "ray" and host and port.isdecimal()):
            raise DeviceError(
                f"The Ray address is {self.ray_address!r}: give host:port, such as 10.0.0.1:6379, "
                "with where='ray' only."
            )

    @property
    def num_ranks(self) -> int:
        """Processes, and on CUDA GPUs, of the group."""
        return self.layout.num_gpus

    def meets(self, other: "GroupConfig") -> bool:
        """Whether both want the same place: the CPU, a Ray cluster, or a GPU."""
        if self.where == other.where == "ray":
            return self.ray_address == other.ray_address
        if self.device == other.device == "cpu":
            return True
        return not set(self.devices).isdisjoint(other.devices)

    def weight_limit(self, computed_bytes: float = 0) -> int:
        """Bytes that weights may take on the device of each rank; 0: it is not known here.

        ``computed_bytes``: as of ``fitting_weights``.
        """
        if self.gpu_memory or not self.devices:
            return self.gpu_memory
        import torch

        if not torch.cuda.is_available():
            return 0
        gpus = {cuda_index(gpu) for gpu in self.devices}
        smallest = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
        return fitting_weights(smallest, computed_bytes)

    @property
    def parts_on_host(self) -> int:
        """How many parts of a model lie in the host's memory, if they do.

        Ranks with the same part have one copy, but on Ray, where they may be on several hosts.
        """
        return self.num_ranks if self.where == "ray" else self.tp_size

    @property
    def attention(self) -> AttentionKernel:
        """What the ranks compute attention with."""
        kernel = attention_kernel()
        return "fixed" if self.reproducible and kernel == "auto" else kernel

    @property
    def layout(self) -> Layout:
        """The same as a layout."""
        return Layout(self.tp_size, self.batch_groups, self.sequence_size)

    @classmethod
    def of_layout(cls, layout: Layout, devices: tuple[int, ...] | None = None) -> "GroupConfig":
        """A group on this machine: on its first GPUs, or on CPU where it has none.

        Raises:
            DeviceError: more GPUs asked for than visible, or an index that does not exist.
        """
        num_ranks = layout.num_gpus
        sizes = {name: getattr(layout, name) for name in ("batch_groups", "sequence_size")}
        visible = visible_gpu_count()
        if visible == 0:
            if devices:
                raise DeviceError(f"GPUs {devices} were asked for, but no CUDA GPU is visible.")
            return cls(layout.tp_size, "cpu", **sizes)
        chosen = tuple(range(num_ranks)) if devices is None else devices
        if num_ranks > visible or any(not 0 <= index < visible for index in chosen):
            raise DeviceError(
                f"{num_ranks} GPUs ({', '.join(map(str, chosen))}) were asked for, but this "
                f"machine shows {visible} (0 to {visible - 1}). Choose at most {visible}, or "
                "'auto'."
            )
        return cls(layout.tp_size, "cuda", chosen, **sizes)


def file_version(path: str) -> tuple[int, int]:
    """Size and modification time (ns) of a model file, or of a folder's files. Raises OSError."""
    place = Path(path)
    files = [file for file in place.iterdir() if file.is_file()] if place.is_dir() else [place]
    stats = [file.stat() for file in files]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


Optimize = Literal["auto", "off"]
OPTIMIZE: tuple[Optimize, ...] = get_args(Optimize)


# What ranks send one another: in its dtype, or in 8 bits where that is faster (``gpu/eight_bit``).
Precision = Literal["exact", "fast"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


# What linear weights may be held in.
WEIGHT_DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("float8_e4m3fn", "float8_e5m2"),
)


class ModelSpec(msgspec.Struct, frozen=True):
    """What identifies a model on a group: the file and the dtypes it runs in.

    ``weight_dtype`` is what linear weights are held in, ``compute_dtype`` what activations are;
    both are torch names such as ``"bfloat16"``. ``version`` tells a replaced file from the one
    that was loaded (size and modification time in ns). ``optimize``: ``"auto"`` compiles and
    records an evaluation once its shapes repeat (GPU only); ``"off"`` runs it as it is written.
    ``fp8_products``: plain weights in e4m3 are multiplied in fp8, if the GPU can and ``optimize``
    is ``"auto"``. ``precision``: ``"fast"`` sends sums, and what attention exchanges, in 8 bits,
    unless NVLink connects the GPUs.
    """

    path: str
    weight_dtype: str
    compute_dtype: str
    version: tuple[int, int] = (0, 0)
    optimize: Optimize = "auto"
    fp8_products: bool = False
    precision: Precision = "exact"

    @classmethod
    def of(
        cls,
        path: str,
        weight_dtype: str,
        compute_dtype: str,
        optimize: Optimize = "auto",
        fp8_products: bool = False,
        precision: Precision = "exact",
    ) -> "ModelSpec":
        """The spec of the file as it is on disk now. Raises CheckpointError if it is not there."""
        if path != printable(path):
            raise CheckpointError(
                f"The path of the model file {path} is no UTF-8, so that the ranks cannot be told "
                "it. Rename the file, or the folder that it is in."
            )
        try:
            version = file_version(path)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"The model file {path} does not exist. Choose another file."
            ) from error
        dtypes = weight_dtype, compute_dtype
        return cls(path, *dtypes, version, optimize, fp8_products, precision)


# Inputs that differ at every evaluation; all others are constant over a generation as a rule.
PER_EVALUATION_INPUTS = ("x", "timesteps", "a_timestep", "latest_times", "control")
# The input of an evaluation that lists the model patches called in it, in their order: of each the
# ``name`` that the ranks hold it by, its ``strength`` and settings, and ``hint``: what its family's
# forward takes of its picture.
MODEL_PATCHES = "model_patches"
# The input that lists tokens (batch, tokens, width) which nodes put before the embedded text, each
# before those that come earlier in the list.
STYLE_TOKENS = "style_tokens"


class ModelPatchSpec(msgspec.Struct, frozen=True):
    """What the ranks need to know of a model patch before they get its tensors.

    ``family``: that takes it, by name; ``comfyui_model``: ComfyUI's class of it. ``shapes``: of
    its tensors that ranks compute with, held and multiplied in ``compute_dtype``.
    """

    family: str
    comfyui_model: str
    shapes: dict[str, tuple[int, ...]]
    compute_dtype: str


class WorkerConfig(msgspec.Struct, frozen=True):
    """Everything that a rank is told at its start.

    ``local_rank``: index of its GPU among those that it sees. ``environment``: changes to the
    environment that it starts in, as bytes, since names and values may be no UTF-8; None removes a
    variable. The file descriptors are the rank's own, and so is the ``rendezvous`` of ranks of one
    machine; it learns of them when it gets them. ``mirrored``: its exchange memory is not the
    engine's. ``part_fd``: of memory for what ranks with the same part of a model keep in the
    host's, if there are several; -1: each has its own. ``kernel_choices``: the file of what was
    fastest on its machine; empty: none is kept.
    """

    rank: int
    local_rank: int
    tp_size: int
    sequence_size: int
    batch_groups: int
    device: str
    num_threads: int
    log_level: str
    rendezvous: str = ""
    fault_file: str = ""
    attention: AttentionKernel = "auto"
    kernel_choices: bytes = b""  # a path may be no UTF-8
    environment: list[tuple[bytes, bytes | None]] = []
    control_fd: int = -1
    exchange_fd: int = -1
    part_fd: int = -1
    mirrored: bool = False

    @property
    def ranks_per_batch_group(self) -> int:
        """Processes of a batch group, which are consecutive."""
        return self.tp_size * self.sequence_size

    @property
    def num_ranks(self) -> int:
        """Processes of the whole group."""
        return self.ranks_per_batch_group * self.batch_groups

    @property
    def tp_rank(self) -> int:
        """This rank's place in its tensor-parallel group."""
        return self.rank % self.tp_size

    @property
    def batch_group(self) -> int:
        """Which of the batch groups it belongs to."""
        return self.rank // self.ranks_per_batch_group

    @property
    def gives_results(self) -> bool:
        """Whether it is the one of its batch group that gives results, which all of them have."""
        return self.rank % self.ranks_per_batch_group == 0
