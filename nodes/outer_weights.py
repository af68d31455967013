"""The weights outside of a model's blocks, for code of ComfyUI's process that computes with them.

Some ControlNets use the model's own embedders of image, text and time. They get the true values,
read from the file when they are first asked for, patched as the MODEL is, in the dtype and on the
device where ComfyUI itself would hold them.
"""

import zlib
from collections.abc import Hashable
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import torch

from ..tp_runtime.client import CheckpointError, CheckpointInfo, file_version, open_checkpoint
from .weights import PREFIX, Patches

# Larger ones are not held a second time beside the ranks' shares.
_MAX_ELEMENTS = 2**25


class OuterWeights:
    """Those of one file, by the names of ComfyUI's model, which are the file's."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._path, self._version = info.path, file_version(info.path)
        self._names = {
            name
            for name in info.sizes.table.outside
            if name in info.tensors
            and name not in info.quantised
            and info.tensors[name].num_elements <= _MAX_ELEMENTS
        }
        self._patched_as: Hashable = None
        self._stages: tuple[Patches, ...] = ()
        self._values: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        """Whether it is one of them."""
        return name in self._names

    def patch(self, version: Hashable, stages: tuple[Patches, ...]) -> None:
        """From now on, give them with these patches, one stage applied after the other.

        Equal versions mean equal patches.
        """
        if version != self._patched_as:
            self._patched_as, self._stages = version, stages
            self.forget()

    def forget(self) -> None:
        """Free them; they are read again when somebody asks."""
        self._values = {}

    def value(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A copy of one of them, in the dtype that the model holds it in.

        Raises:
            CheckpointError: the file was replaced.
        """
        if name not in self._values:
            self._values[name] = self._read(name, dtype)
        return self._values[name].clone()

    def _read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if file_version(self._path) != self._version:
            raise CheckpointError(
                f"The model file {self._path} was replaced after the model had been loaded. Queue "
                "the prompt again."
            )
        with open_checkpoint(self._path) as file:
            weight = file.read(name, None, None).to(dtype, copy=True)
        weight = weight.to(comfy.model_management.get_torch_device())
        key = f"{PREFIX}{name}"
        for stage in self._stages:
            if patches := stage.get(key):
                weight = _patched(weight, patches, key)
        return weight


def _patched(weight: torch.Tensor, patches: list[tuple[Any, ...]], key: str) -> torch.Tensor:
    """As ComfyUI patches a weight when it loads a model."""
    changed = comfy.lora.calculate_weight(list(patches), weight.float(), key)
    return comfy.float.stochastic_rounding(changed, weight.dtype, seed=zlib.crc32(key.encode()))
