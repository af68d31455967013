"""A rank's shard of a model patch: built from its sizes, filled by ComfyUI's process."""

from collections.abc import Mapping

import torch
from torch import nn

from ..config import ModelPatchSpec
from ..recognise import model_patch
from ..sharding.parts import Part
from ..sharding.quantisation import sharded
from ..wire.exchange import dtype_of
from .host_copy import PartMemory
from .loaded_model import Shard
from .parallel_layers import shard_module


class LoadedPatch(Shard):
    """``module`` is what the forward of a model calls."""

    def __init__(
        self,
        spec: ModelPatchSpec,
        device: torch.device,
        rank: int,
        tp_size: int,
        part_memory: PartMemory | None = None,
    ) -> None:
        dtype = dtype_of(spec.compute_dtype)
        sizes = model_patch(spec.family, spec.comfyui_model, spec.shapes)
        with torch.device("meta"):
            self.module = nn.Module.to(sizes.build(), dtype)
        self.module.requires_grad_(False)
        table = sizes.table
        sharding, quantisation = sharded(self.module, table.plan, table.sources, {}, tp_size)
        shard_module(self.module, sharding, tp_size, dtype, dtype, quantisation.held, False, False)
        self.module.to_empty(device=device)
        super().__init__(self.module, device, part_memory=part_memory)
        for parameter in self._parameters.values():
            parameter.data.zero_()  # what no tensor fills is padding
        self._parts: dict[str, list[Part]] = {}
        for part in sharding.parts(rank, tp_size, table.sources):
            self._parts.setdefault(part.source, []).append(part)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's slices of whole tensors to their places."""
        for name, tensor in tensors.items():
            for part in self._parts[name]:
                found = tensor[slice(*part.rows)]
                if part.columns is not None:
                    found = found[:, slice(*part.columns)]
                place = self._parameters[part.target].data
                place.narrow(part.axis, part.target_start, part.length).copy_(found)
