"""Builds a rank's shard of a model: module tree, parallel layers, weights from the file."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from . import dist
from .acceleration import GraphedStep
from .checkpoint import CheckpointFile, CheckpointInfo, inspect_checkpoint
from .config import ModelSpec
from .models import family
from .models.common import DriverBase
from .sharding.parts import (
    SCALE,
    Layer,
    Part,
    Sources,
    layer_parts,
    plan_layers,
    whole_parameters,
    whole_parts,
)
from .sharding.walker import replace_linears
from .tensors import dtype_of

PROGRESS_INTERVAL_S = 0.05
FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

ReportProgress = Callable[[int, int], None]


@dataclass
class LoadedModel:
    """A rank's shard of a model, ready to be evaluated."""

    driver: DriverBase
    resident_bytes: int
    bytes_read: int


def load_model(
    spec: ModelSpec,
    device: torch.device,
    rank: int,
    tp_size: int,
    report_progress: ReportProgress,
) -> LoadedModel:
    """Read the slices of the file that this rank holds, and nothing else of it.

    ``report_progress(done, total)`` is called with bytes now and then.

    Raises:
        CheckpointError: the file is not what it was when the model was chosen.
    """
    info = inspect_checkpoint(spec.path)
    module = family(info.family)
    compute_dtype, weight_dtype = dtype_of(spec.compute_dtype), dtype_of(spec.weight_dtype)
    with torch.device("meta"):
        model = nn.Module.to(module.build(info.config), compute_dtype)
    model.requires_grad_(False)
    layers = plan_layers(model, module.plan(info.config))
    whole = whole_parameters(model, layers)
    sources = module.sources(info.config)
    scaled = _scaled_layers(layers, sources, info)
    replace_linears(model, layers, tp_size, weight_dtype, compute_dtype, scaled)
    parts = [part for layer in layers for part in layer_parts(layer, rank, tp_size, sources)]
    parts += [part for name in whole for part in whole_parts(name, sources)]
    model.to_empty(device=device)
    with CheckpointFile.open(spec.path) as file:
        _fill(model, parts, _Reader(file, info.scales, weight_dtype), report_progress)
        bytes_read = file.bytes_read
    resident = sum(parameter.nbytes for parameter in model.parameters())
    driver = module.Driver(model.eval(), info.config, dist.all_gather_last)
    if device.type == "cuda" and spec.optimize == "auto":
        driver.run_step = GraphedStep(driver.step, lambda: dist.graph_capture(device))
    return LoadedModel(driver, resident, bytes_read)


def _scaled_layers(
    layers: list[Layer], sources: Sources, info: CheckpointInfo
) -> dict[str, torch.dtype]:
    """Layers all of whose weights are stored in one fp8 dtype with a scale, and that dtype."""
    found = {}
    for layer in layers:
        stored = {source.name for path in layer.replaced for source in sources(f"{path}.weight")}
        dtypes = {info.tensors[name].dtype for name in stored}
        if stored <= info.scales.keys() and len(dtypes) == 1 and dtypes <= FP8_DTYPES.keys():
            found[layer.path] = FP8_DTYPES[dtypes.pop()]
    return found


class _Reader:
    """Reads parts as a parameter holds them: rounded to the weights' dtype, or with a scale."""

    def __init__(
        self, file: CheckpointFile, scales: Mapping[str, str], weight_dtype: torch.dtype
    ) -> None:
        self._file = file
        self._scales = scales
        self._weight_dtype = weight_dtype

    def scale(self, part: Part) -> float:
        """The number that the part's values are to be multiplied by."""
        name = self._scales.get(part.source)
        return 1.0 if name is None else self._file.read(name, None, None).float().item()

    def read(self, part: Part, with_scale: bool) -> torch.Tensor:
        """The part's values; ``with_scale``: multiplied, and rounded as all weights are.

        ComfyUI rounds everything to the weights' dtype, also what it computes with in another.
        """
        data = self._file.read(part.source, part.rows, part.columns)
        if not with_scale:
            return data
        if part.source in self._scales:
            data = data.float() * self.scale(part)
        return data.to(self._weight_dtype)


def _fill(
    model: nn.Module, parts: list[Part], reader: _Reader, report_progress: ReportProgress
) -> None:
    """Copy every part to its place; what no part covers is padding and becomes zero."""
    parameters = dict(model.named_parameters())
    total = sum(parameter.nbytes for parameter in parameters.values())
    scales = {name: value for name, value in parameters.items() if name.endswith(f".{SCALE}")}
    by_target: dict[str, list[Part]] = {}
    for part in parts:
        by_target.setdefault(part.target, []).append(part)
    expected = parameters.keys() - scales.keys()
    assert by_target.keys() == expected, by_target.keys() ^ expected
    done, reported = 0, 0.0
    for name, here in by_target.items():
        parameter = parameters[name]
        if sum(_length(part) for part in here) < parameter.shape[here[0].axis]:
            parameter.data.zero_()
        scale = scales.get(f"{name}_scale")
        if scale is not None:
            scale.data.fill_(1.0)
        for part in here:
            place = parameter.data.narrow(part.axis, part.target_start, _length(part))
            place.copy_(reader.read(part, with_scale=scale is None))
            if scale is not None:
                rows = scale if part.axis else scale.narrow(0, part.target_start, _length(part))
                rows.data.fill_(reader.scale(part))
        done += parameter.nbytes
        if time.monotonic() - reported > PROGRESS_INTERVAL_S:
            report_progress(done, total)
            reported = time.monotonic()
    report_progress(total, total)


def _length(part: Part) -> int:
    """What the part covers of the axis that is split."""
    start, stop = part.rows if part.columns is None else part.columns
    return stop - start
