"""A rank's shard of a model, as the rank holds it: awake or asleep, patched or not."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..config import Precision
from ..models.forward import Memo, Prediction, ShardedForward
from ..wire.protocol import PatchedWeight
from .host_copy import HostCopy, PartMemory
from .patched_weights import PatchedWeights
from .streamed_layers import StreamedLayers


class Shard:
    """A module's parameters, on the device or in the host's memory.

    ``resident_bytes``: on the device while it is awake; ``streamed_bytes``: with the host, always.
    ``precision``: of what its ranks send one another for it. ``part_memory``: the host
    memory of the ranks that hold the same; None: each has its own.
    """

    precision: Precision = "exact"

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        streamed: StreamedLayers | None = None,
        part_memory: PartMemory | None = None,
    ) -> None:
        self._device = device
        self._part_memory = part_memory
        self._copy: HostCopy | None = None
        self.asleep = False
        self.bytes_read = 0  # of a file
        self._parameters = dict(module.named_parameters())
        self._streamed = streamed
        self.resident_bytes = sum(parameter.nbytes for parameter in self._parameters.values())
        self.streamed_bytes = 0
        if streamed is not None:
            of_layers = sum(tensor.nbytes for tensor in streamed.memory.tensors.values())
            self.streamed_bytes = streamed.memory.nbytes
            self.resident_bytes += streamed.stream.ring_bytes - of_layers

    @property
    def num_patched(self) -> int:
        """How many weights are not as the file has them."""
        return 0

    def sleep(self) -> None:
        """Move the weights to the host's memory.

        On a CPU they are there already and stay in their place.
        """
        if self.asleep:
            return
        self.asleep = True
        if self._streamed is not None:
            self._streamed.stream.leave_device()
        if self._device.type == "cuda":
            there = {name: p.data for name, p in self._parameters.items() if p.is_cuda}
            self._copy = HostCopy(there, self._part_memory)
            for name in there:
                parameter = self._parameters[name]
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=self._device)

    def wake(self) -> None:
        """Move the weights back to the device."""
        if self.asleep and self._streamed is not None:
            self._streamed.stream.to_device()
        self.asleep = False
        if self._copy is not None:
            for name, copy in self._copy.tensors.items():
                self._parameters[name].data = copy.to(self._device, non_blocking=True)
            self._copy.close()
            self._copy = None

    def close(self) -> None:
        """Give back the host's memory that it takes. It cannot be used any more."""
        if self._copy is not None:
            self._copy.close()
        if self._streamed is not None:
            self._streamed.memory.close()

    def digest(self) -> str:
        """A hash of the weights as they are now, padding included."""
        found = hashlib.blake2s()
        for name, parameter in sorted(self._parameters.items()):
            asleep = self._copy.tensors if self._copy else {}
            copy = asleep[name] if name in asleep else parameter.data.cpu()
            found.update(name.encode())
            found.update(copy.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()


class LoadedModel(Shard):
    """A rank's shard of a model: evaluated by ``forward``, changed through ``weights``."""

    def __init__(
        self,
        forward: ShardedForward,
        weights: PatchedWeights,
        device: torch.device,
        new_run: Callable[[], Callable[..., Prediction]],
        new_memo: Callable[[], Memo],
        bytes_read: int,
        streamed: StreamedLayers | None = None,
        precision: Precision = "exact",
        part_memory: PartMemory | None = None,
    ) -> None:
        super().__init__(forward.model, device, streamed, part_memory)
        self.precision = precision
        self.forward = forward
        self.weights = weights
        self.bytes_read = bytes_read
        self._new_run = new_run
        self._new_memo = new_memo
        self.forget()

    @property
    def num_patched(self) -> int:
        return len(self.weights)

    def patch(self, changes: Mapping[str, PatchedWeight], held: Mapping[int, torch.Tensor]) -> None:
        """Change the weights; see ``PatchedWeights.apply``."""
        self.weights.apply(changes, held)
        self.forward.memo = self._new_memo()  # what it had was computed with the weights of before

    def sleep(self) -> None:
        """Also drops what was computed and recorded of the weights."""
        if not self.asleep:
            self.forget()
        super().sleep()

    def forget(self) -> None:
        """Drop what was computed and recorded."""
        self.forward.memo = self._new_memo()
        self.forward.run = self._new_run()
        self.forward.model_patches = {}
        self.weights.drop_other_shapes()

    def close(self) -> None:
        self.weights.close()
        super().close()
