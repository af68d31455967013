"""What a step asks of its tensor-parallel group beside sums, and how its GPUs are connected."""

import contextlib
import functools
import hashlib
import logging
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from vllm.distributed import parallel_state
from vllm.platforms import current_platform
from vllm.third_party import pynvml

from ..config import EXCHANGE_TURNS, exchange_turns, may_access_peers, ranks_on_one_gpu
from . import host_wire
from .epilogue import Product
from .speeds import least_seconds

logger = logging.getLogger("tp_runtime.gpu.collectives")

LINK_SIZES = 2**16, 2**25  # bytes: what takes hardly longer than nothing, and a step's tokens
LINK_REPEATS, LINK_ROUNDS = 8, 3  # the first round also sets up what they need

_host_wire: host_wire.HostWire | None = None  # of the ranks that share tokens


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Put the ranks' parts of the last axis together; equal on every rank."""
    return parallel_state.get_tp_group().all_gather(tensor, -1)


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over the tensor-parallel group, element by element; equal on every rank."""
    return parallel_state.get_tp_group().all_reduce(tensor)


def summed(products: Sequence[Product]) -> list[torch.Tensor]:
    """What row-parallel linears make of their inputs, summed over the tensor-parallel group."""
    return [linear(x) for linear, x in products]


def meet() -> None:
    """Wait until every rank of the whole group has called it."""
    parallel_state.get_world_group().barrier()


def sequence_size() -> int:
    """Ranks that share the tokens: vLLM calls it context parallelism."""
    return parallel_state.get_pcp_group().world_size


def sequence_rank() -> int:
    """Which of them this one is."""
    return parallel_state.get_pcp_group().rank_in_group


def connect_sharers() -> None:
    """Find the best way for what the ranks exchange that share tokens. All must call it."""
    global _host_wire
    apart = parallel_state.get_tp_group().world_size
    _host_wire = _wire_between(parallel_state.get_pcp_group(), apart)


def _wire_between(
    group: parallel_state.GroupCoordinator, apart: int = 1
) -> host_wire.HostWire | None:
    """Through the host's memory, between GPUs of one host that cannot reach each other."""
    if (
        group.world_size == 1
        or group.device.type != "cuda"
        or not all(on_one_host(group.cpu_group))
    ):
        return None
    if _peer_access(_gpus(group, apart)):
        return None
    return host_wire.connected(group.cpu_group, group.device)


def begin_all_to_all(
    sent: torch.Tensor, given: Sequence[int], taken: Sequence[int]
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Give each rank of the sequence group so many of the bytes, and take so many from each.

    Returns at once what is taken, and what waits for it: a GPU's stream does, not the caller.
    """
    received = sent.new_empty(sum(taken))
    if _host_wire is not None:
        parts = sent.split(list(given)), received.split(list(taken))
        return received, _host_wire.begin(*parts)
    group = parallel_state.get_pcp_group().device_group
    sizes = list(taken), list(given)
    work = dist.all_to_all_single(received, sent, *sizes, group=group, async_op=True)
    return received, work.wait


def begin_exchange(
    parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
) -> Callable[[], list[torch.Tensor]]:
    """Begin ``exchange``; what is returned waits for it: a GPU's stream does, not the caller."""
    sizes = [math.prod(shape) for shape in shapes]
    sent = torch.cat([part.flatten() for part in parts])
    width = sent.element_size()
    # As bytes: gloo knows no bf16 here.
    given, taken = ([width * size for size in of] for of in (map(torch.numel, parts), sizes))
    received, wait = begin_all_to_all(sent.view(torch.uint8), given, taken)

    def arrived() -> list[torch.Tensor]:
        wait()
        stretches = received.view(sent.dtype).split(sizes)
        return [one.view(*shape) for one, shape in zip(stretches, shapes, strict=True)]

    return arrived


def exchange(parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Give each rank of the sequence group its part; what each gives to this one, of that shape."""
    return begin_exchange(parts, shapes)()


def turns(num_bytes: int) -> int:
    """In how many exchanges the heads of an attention go: several where that was measured to pay.

    ``num_bytes``: of what a rank gives each other one. On the CPU as many as there may be, for the
    tests.
    """
    if parallel_state.get_pcp_group().device.type == "cpu":
        return EXCHANGE_TURNS
    return exchange_turns(num_bytes) if exchanges_beside() else 1


def exchanges_beside() -> bool:
    """Whether exchanges leave the multiprocessors to what is computed meanwhile.

    Copies through the host's memory do, kernels of NCCL do not. On the CPU it is said, for the
    tests.
    """
    return _host_wire is not None or parallel_state.get_pcp_group().device.type == "cpu"


def on_one_host(group: dist.ProcessGroup, source_rank: int = 0) -> list[bool]:
    """For each rank of a group on the CPU, whether it is on the source's host. All must ask.

    By the hosts' names. The same signature as vLLM's ``in_the_same_node_as``
    (vllm/distributed/parallel_state.py, 0.32), which asks it of a named file in /dev/shm: where
    that is full, it ends the process or waits for ever.
    """
    host = torch.tensor(list(hashlib.sha256(platform.node().encode()).digest()), dtype=torch.uint8)
    hosts = [torch.empty_like(host) for _ in range(dist.get_world_size(group))]
    dist.all_gather(hosts, host, group=group)
    return [torch.equal(one, hosts[source_rank]) for one in hosts]


def _gpus(group: parallel_state.GroupCoordinator, apart: int = 1) -> range | None:
    """Those of a group, by this process's numbers; None if not all are here.

    ``apart``: from one of its ranks to the next. A rank sees the GPUs of all ranks on its host in
    their order, so fewer than these if the group spans hosts.
    """
    if ranks_on_one_gpu():
        shared = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
        return range(1) if shared else None
    first = torch.cuda.current_device() - apart * group.rank_in_group
    gpus = range(first, first + apart * (group.world_size - 1) + 1, apart)
    return gpus if first >= 0 and gpus.stop <= torch.cuda.device_count() else None


def peer_access() -> bool:
    """Whether all GPUs of the tensor-parallel group can read each other's memory.

    Over NVLink or PCIe.
    """
    return _peer_access(_gpus(parallel_state.get_tp_group()))


def _peer_access(gpus: range | None) -> bool:
    if gpus is None or not may_access_peers():
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)


def nvlink() -> bool:
    """Whether NVLink connects all GPUs of the tensor-parallel group. One alone needs none.

    Where GPUs read each other's memory over PCIe, they need not be able to change it atomically;
    torch's barriers between them would then wait for ever (torch/csrc/distributed/c10d/
    symm_mem/CUDASymmetricMemory-inl.h, 2.11).
    """
    return _nvlink(_gpus(parallel_state.get_tp_group()))


def nvlink_of_sharers() -> bool:
    """The same of the GPUs that share the tokens."""
    apart = parallel_state.get_tp_group().world_size
    return _nvlink(_gpus(parallel_state.get_pcp_group(), apart))


def _nvlink(gpus: range | None) -> bool:
    if gpus is None:
        return False
    if len(gpus) == 1:
        return True
    return _peer_access(gpus) and current_platform.is_fully_connected(_numbers_of_nvml(gpus))


def _numbers_of_nvml(gpus: Iterable[int]) -> list[int]:
    """How NVML counts GPUs: by their place on the bus. CUDA counts the fastest first, unless it is
    told otherwise, and vLLM goes by its numbers.
    """
    try:
        pynvml.nvmlInit()
        try:
            uuids = [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in gpus]
            return [pynvml.nvmlDeviceGetIndex(pynvml.nvmlDeviceGetHandleByUUID(u)) for u in uuids]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:  # a part of a GPU (MIG) has a name of its own
        logger.info("NVML does not find the GPUs by their UUIDs (%s): by their numbers.", error)
        return [current_platform.device_id_to_physical_device_id(gpu) for gpu in gpus]


def link_times(device: torch.device) -> dict[str, list[float]]:
    """Seconds of a sum and of an exchange over all ranks, of so many bytes. All must ask.

    In a group of its own, whose buffers are given back.
    """
    group = dist.new_group()
    wire = _wire_between(parallel_state.get_world_group())
    found: dict[str, list[float]] = {"sizes": list(LINK_SIZES), "sums_s": [], "exchanges_s": []}
    for size in LINK_SIZES:
        tensor = torch.zeros(size, dtype=torch.uint8, device=device)
        parts = tensor.tensor_split(dist.get_world_size(group))
        received = torch.cat([parts[dist.get_rank(group)]] * len(parts))
        summed = functools.partial(dist.all_reduce, tensor.view(torch.float32), group=group)
        given, taken = ([len(one) for one in of] for of in (parts, received.chunk(len(parts))))
        if wire is not None:
            exchanged = functools.partial(_through, wire, parts, received.split(taken))
        else:
            sizes = taken, given
            exchanged = functools.partial(
                dist.all_to_all_single, received, tensor, *sizes, group=group
            )
        times = [
            least_seconds(one, device, LINK_REPEATS, LINK_ROUNDS) for one in (summed, exchanged)
        ]
        for name, seconds in zip(("sums_s", "exchanges_s"), times, strict=True):
            found[name].append(seconds)
    if wire is not None:
        wire.close()
    dist.destroy_process_group(group)
    return found


def _through(
    wire: host_wire.HostWire, parts: Sequence[torch.Tensor], received: Sequence[torch.Tensor]
) -> None:
    wire.begin(parts, received)()


@contextlib.contextmanager
def graph_capture(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """vLLM's context in which collectives may be recorded into a CUDA graph; yields its stream."""
    context = parallel_state.GraphCaptureContext(_capture_stream(device))
    with parallel_state.get_tp_group().graph_capture(context):
        yield context.stream


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    # One for all graphs: cuBLAS keeps a workspace of 32 MiB for every stream that it has seen.
    return torch.cuda.Stream(device)
