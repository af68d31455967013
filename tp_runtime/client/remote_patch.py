"""A model patch on a group, as the nodes hold it."""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..config import ModelPatchSpec
from ..recognise import CheckpointInfo
from ..wire.exchange import dtype_of
from ..wire.protocol import PatchedWeight
from .call import OnProgress
from .poll import Poll

if TYPE_CHECKING:
    from .engine import Engine

Tensors = Callable[[], Mapping[str, torch.Tensor]]

_numbers = itertools.count(1)


class RemotePatch:
    """A model patch on the group of a model, which keeps it for as long as this object is there.

    Cheap: the ranks get it when it is first used. ``RemoteModel.model_patch`` makes them.
    """

    def __init__(
        self, info: CheckpointInfo, compute_dtype: str, tp_size: int, kind: str, tensors: Tensors
    ) -> None:
        """For the model ``info``; see ``RemoteModel.model_patch``. Raises InputError."""
        found = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
        shapes = info.model_patch_shapes(kind, found)
        self.name = f"{kind} {next(_numbers)}"
        self.label = kind
        self.version: Hashable = None
        self.patches: Mapping[str, PatchedWeight] = {}  # its own weights have none
        self._spec = ModelPatchSpec(info.family.name, kind, shapes, compute_dtype)
        self._tensors = tensors
        self._planned_bytes = sum(map(math.prod, shapes.values())) * self._dtype.itemsize // tp_size

    @property
    def _dtype(self) -> torch.dtype:
        return dtype_of(self._spec.compute_dtype)

    def planned_bytes(self) -> int:
        """Bytes that the weights will take on each rank's device, to within a few percent."""
        return self._planned_bytes

    def planned_streaming(self) -> int:
        """Bytes that will stay in the host's memory for each rank: it is never streamed."""
        return 0

    def bytes_of(self, weights: Iterable[str]) -> int:  # noqa: ARG002
        """See ``Holdable``: nothing changes its weights."""
        return 0

    def load(
        self, engine: "Engine", poll: Poll | None, on_progress: OnProgress | None
    ) -> tuple[list[int], list[int]]:
        """Have the ranks hold it; see ``Holdable``. Raises as ``Engine.call``."""
        held = engine.load_patch(self.name, self._spec, self._as_held(), poll, on_progress)
        return held, [0] * len(held)

    def _as_held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that ranks compute with, by name. ComfyUI casts them whenever it computes."""
        tensors = self._tensors()
        for name in self._spec.shapes:
            yield name, tensors[name].detach().to(self._dtype)
