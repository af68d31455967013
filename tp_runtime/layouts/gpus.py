"""GPUs that a model may be on, which need not be alike, and which of them a layout takes.

Each rank has an equal share, so a step takes as long as on the slowest GPU, and the smallest one
must hold a share.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..config import cuda_index, device_name
from .cost_model import DEVICES, Device, device_of
from .link_records import Speed


@dataclass(frozen=True)
class Gpu:
    """A visible GPU: its number, product name and bytes of memory."""

    number: int
    name: str
    memory: int

    @property
    def gib(self) -> int:
        return round(self.memory / 2**30)

    def __str__(self) -> str:
        return f"{self.number} ({self.name}, {self.gib} GiB)"


def gpus_of(numbers: Iterable[int]) -> list[Gpu]:
    """These visible GPUs, as torch knows them."""
    import torch

    return [
        Gpu(
            number,
            device_name(number),
            torch.cuda.get_device_properties(cuda_index(number)).total_memory,
        )
        for number in numbers
    ]


def kind_of(name: str, speeds: Mapping[str, Speed]) -> Device:
    """The kind of that name; of one that is not known, with what was measured."""
    found = device_of(name)
    is_measured = found is DEVICES["other"] and name in speeds
    return speeds[name].device(name) if is_measured else found


def devices_of(names: Iterable[str], speeds: Mapping[str, Speed]) -> list[Device]:
    """The kinds of GPUs with these names, each once.

    Of one that is neither known nor measured, no speed is: then all of them count as the same.
    """
    found = list(dict.fromkeys(kind_of(name, speeds) for name in names))
    return [DEVICES["other"]] if DEVICES["other"] in found else found


def best_first(gpus: Sequence[Gpu], speeds: Mapping[str, Speed]) -> list[Gpu]:
    """The fastest first, and of those as fast the largest; else in the order that they are in."""
    same = len(devices_of((gpu.name for gpu in gpus), speeds)) <= 1

    def rank(gpu: Gpu) -> tuple[float, int]:
        return (0.0 if same else -kind_of(gpu.name, speeds).matmul), -gpu.gib

    return sorted(gpus, key=rank)


def are_alike(gpus: Iterable[Gpu]) -> bool:
    """Whether they have the same name and about the same memory."""
    return len({(gpu.name, gpu.gib) for gpu in gpus}) <= 1
