"""Builds a rank's shard of a model: module tree, parallel layers, weights from the file."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from . import dist
from .acceleration import GraphedStep
from .checkpoint import CheckpointFile, inspect_checkpoint
from .config import ModelSpec
from .models import family
from .models.common import DriverBase
from .sharding.parts import Part, layer_parts, plan_layers, whole_parameters, whole_parts
from .sharding.walker import replace_linears
from .tensors import dtype_of

PROGRESS_INTERVAL_S = 0.05

ReportProgress = Callable[[int, int], None]


@dataclass
class LoadedModel:
    """A rank's shard of a model, ready to be evaluated."""

    driver: DriverBase
    parts: list[Part]
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
    compute_dtype = dtype_of(spec.compute_dtype)
    with torch.device("meta"):
        model = nn.Module.to(module.build(info.config), compute_dtype)
    model.requires_grad_(False)
    layers = plan_layers(model, module.plan(info.config))
    whole = whole_parameters(model, layers)
    replace_linears(model, layers, tp_size, dtype_of(spec.weight_dtype), compute_dtype)

    sources = module.sources(info.config)
    parts = [part for layer in layers for part in layer_parts(layer, rank, tp_size, sources)]
    parts += [part for name in whole for part in whole_parts(name, sources)]
    model.to_empty(device=device)
    with CheckpointFile.open(spec.path) as file:
        _fill(model, parts, file, report_progress)
        bytes_read = file.bytes_read
    resident = sum(parameter.nbytes for parameter in model.parameters())
    driver = module.Driver(model.eval(), info.config, dist.all_gather_last)
    if device.type == "cuda" and spec.optimize == "auto":
        driver.run_step = GraphedStep(driver.step, lambda: dist.graph_capture(device))
    return LoadedModel(driver, parts, resident, bytes_read)


def _fill(
    model: nn.Module, parts: list[Part], file: CheckpointFile, report_progress: ReportProgress
) -> None:
    """Copy every part to its place; what no part covers is padding and becomes zero."""
    parameters = dict(model.named_parameters())
    total = sum(parameter.nbytes for parameter in parameters.values())
    by_target: dict[str, list[Part]] = {}
    for part in parts:
        by_target.setdefault(part.target, []).append(part)
    assert by_target.keys() == parameters.keys(), by_target.keys() ^ parameters.keys()
    done, reported = 0, 0.0
    for name, parameter in parameters.items():
        if (
            sum(_length(part) for part in by_target[name])
            < parameter.shape[by_target[name][0].axis]
        ):
            parameter.data.zero_()
        for part in by_target[name]:
            data = file.read(part.source, part.rows, part.columns)
            place = parameter.data.narrow(part.axis, part.target_start, _length(part))
            place.copy_(data)
        done += parameter.nbytes
        if time.monotonic() - reported > PROGRESS_INTERVAL_S:
            report_progress(done, total)
            reported = time.monotonic()
    report_progress(total, total)


def _length(part: Part) -> int:
    """What the part covers of the axis that is split."""
    start, stop = part.rows if part.columns is None else part.columns
    return stop - start
