"""GPUs that a model may be on, which need not be alike, and which of them a layout takes.

Each rank has an equal share, so a step takes as long as on the slowest GPU, and the smallest one
must hold a share.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import cuda_index, device_name
from .cost_model import Device, by_data_sheet, device_of
from .link_records import Speed

# By compute capability: operations of dense products in bf16 (in fp16, where there is none) with
# sums in fp32 that a multiprocessor does in a clock. From NVIDIA's papers on the architectures.
_OPERATIONS = {
    (7, 0): 1024,
    (7, 5): 1024,
    (8, 0): 2048,
    (8, 6): 1024,
    (8, 9): 1024,
    (9, 0): 4096,
    (10, 0): 8192,
    (10, 3): 8192,
    (12, 0): 1024,
    (12, 1): 1024,
}
_LIKE_MOST = 1024
# Where torch does not tell: kHz, and bytes/s of memory.
_USUAL_CLOCK, _USUAL_MEMORY = 1_800_000, 0.8e12


@dataclass(frozen=True)
class Gpu:
    """A visible GPU: its number, product name and bytes of memory.

    ``kind``: what is known of such GPUs, or likely by their architecture.
    """

    number: int
    name: str
    memory: int
    kind: Device

    @property
    def gib(self) -> int:
        return round(self.memory / 2**30)

    def __str__(self) -> str:
        return f"{self.number} ({self.name}, {self.gib} GiB)"


def gpus_of(numbers: Iterable[int]) -> list[Gpu]:
    """These visible GPUs, as torch knows them."""
    import torch

    found = []
    for number in numbers:
        name, of_gpu = device_name(number), torch.cuda.get_device_properties(cuda_index(number))
        kind = device_of(name) or by_architecture(name, of_gpu)
        found.append(Gpu(number, name, of_gpu.total_memory, kind))
    return found


def by_architecture(name: str, properties: Any) -> Device:
    """How fast a GPU that is not in ``cost_model.DEVICES`` is likely to be.

    ``properties``: as ``torch.cuda.get_device_properties`` gives them; older releases of torch do
    not tell clocks. GeForce cards add up in fp32 at half of the rate. Of those with NVLink, names
    say SXM, or the architecture is one of data centres.
    """
    capability = properties.major, properties.minor
    of_centres = properties.major in (9, 10)
    multiprocessors = properties.multi_processor_count
    operations = _OPERATIONS.get(capability, _LIKE_MOST)
    if "GeForce" in name:
        operations //= 2
    clock = getattr(properties, "clock_rate", 0) or _USUAL_CLOCK
    bits = getattr(properties, "memory_bus_width", 0)
    # So many bits, twice a clock.
    memory = 2e3 * getattr(properties, "memory_clock_rate", 0) * bits / 8 or _USUAL_MEMORY
    return by_data_sheet(
        name,
        multiprocessors * operations * clock * 1e3 / 1e12,
        memory,
        multiprocessors,
        pcie=5 if properties.major >= 9 else 4,
        nvlink=of_centres or "SXM" in name,
        of="what its architecture and clocks allow",
    )


def kind_of(gpu: Gpu, speeds: Mapping[str, Speed]) -> Device:
    """The kind of the GPU; if it is not one of the known, with the speed that was measured."""
    if device_of(gpu.name) is None and gpu.name in speeds:
        return speeds[gpu.name].on(gpu.kind)
    return gpu.kind


def devices_of(gpus: Iterable[Gpu], speeds: Mapping[str, Speed]) -> list[Device]:
    """The kinds of these GPUs, each once."""
    return list(dict.fromkeys(kind_of(gpu, speeds) for gpu in gpus))


def best_first(gpus: Sequence[Gpu], speeds: Mapping[str, Speed]) -> list[Gpu]:
    """The fastest first, and of those as fast the largest; else in the order that they are in."""
    return sorted(gpus, key=lambda gpu: (-kind_of(gpu, speeds).matmul, -gpu.gib))


def are_alike(gpus: Iterable[Gpu]) -> bool:
    """Whether they have the same name and about the same memory."""
    return len({(gpu.name, gpu.gib) for gpu in gpus}) <= 1
