"""A shard that is larger than its device may hold: the layers whose weights stay with the host."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase

from ..config import fitting_weights
from ..gpu.streaming import LayerStream, StreamedLayer
from ..sharding.parts import Sharding
from ..sharding.streaming import LayerSize, StreamingPlan, streaming_plan
from ..sharding.table import Table
from .host_copy import HostMemory, PartMemory, aligned


@dataclass(frozen=True)
class StreamedLayers:
    """Those of a model: their ``memory`` in the host, and what brings them to the device."""

    stream: LayerStream
    memory: HostMemory


def plan_for(
    model: nn.Module, sharding: Sharding, table: Table, label: str, limit: int | None
) -> StreamingPlan | None:
    """Which layers of a sharded module to stream, so that it takes ``limit`` bytes.

    Raises:
        SizeError: even with all of its blocks streamed, it takes more.
    """
    passing = table.passing
    over = {layer.path: passing.get(layer.replaced[0]) for layer in sharding.layers}
    layers = [
        LayerSize(path, what, sum(aligned(one.nbytes) for one in _tensors(module).values()))
        for path, module in model.named_modules()
        if isinstance(module, LinearBase) and (what := over[path]) is not None
    ]
    total = sum(parameter.nbytes for parameter in model.parameters())
    return streaming_plan(label, layers, total, limit)


def limit_of(device: torch.device, asked: int, computed_bytes: int) -> int | None:
    """Bytes that weights may take on a device: those asked for, or what its memory allows.

    Beside so many that a step needs. None: there is no limit, on the CPU.
    """
    if asked:
        return asked
    if device.type != "cuda":
        return None
    total = torch.cuda.get_device_properties(device).total_memory
    return fitting_weights(total, computed_bytes)


def give_memory(
    model: nn.Module,
    device: torch.device,
    plan: StreamingPlan | None,
    part_memory: PartMemory | None = None,
) -> StreamedLayers | None:
    """Have the parameters of a module on the meta device lie in real memory, without values.

    On the device; of the plan's layers, if there is one, in the host's memory (``part_memory``).
    """
    layers = {path: model.get_submodule(path) for path in plan.paths} if plan else {}
    like = {path: _tensors(layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        for name, tensor in like[path].items():
            empty = nn.Parameter(tensor.new_empty(0), requires_grad=False)
            setattr(layer, name, empty)
    model.to_empty(device=device)
    if plan is None:
        return None
    by_name = {
        f"{path}.{name}": tensor
        for path, of_layer in like.items()
        for name, tensor in of_layer.items()
    }
    memory = HostMemory(by_name, locked=device.type == "cuda", part_memory=part_memory)
    streamed = []
    for path, layer in layers.items():
        tensors = {name: memory.tensors[f"{path}.{name}"] for name in like[path]}
        for name, tensor in tensors.items():
            layer.get_parameter(name).data = tensor
        names = [f"{path}.{name}" for name in tensors]
        streamed.append(StreamedLayer(layer, memory.spanned(names[0], names[-1]), tensors))
    return StreamedLayers(LayerStream(streamed, device, plan.ring_bytes), memory)


def _tensors(layer: nn.Module) -> Mapping[str, torch.Tensor]:
    """What is streamed of a layer. Its bias, which sums over the ranks add, is not."""
    return {name: one.data for name, one in layer.named_parameters() if name != "bias"}
