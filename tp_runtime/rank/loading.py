"""Builds a rank's shard of a model: module tree, parallel layers, weights from the file."""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import torch
from torch import nn

from ..config import AttentionKernel, ModelSpec, file_version
from ..errors import CheckpointError
from ..fault_points import reach
from ..files.checkpoint import CheckpointFile
from ..gpu import collectives
from ..gpu.graphs import RecordedEvaluation
from ..models.forward import ShardedForward
from ..recognise import CheckpointInfo, inspect_checkpoint, open_checkpoint
from ..sharding.parts import SCALE, Layer, Part, Sharding, Sources
from ..wire.exchange import dtype_of
from .loaded_model import LoadedModel
from .parallel_layers import shard_module
from .patched_weights import PatchedWeights, StoredWeight
from .uploading import Uploads

PROGRESS_INTERVAL_S = 0.05
FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

ReportProgress = Callable[[int, int], None]
Copy = Callable[[torch.Tensor, torch.Tensor], object]  # source on the CPU, place on the device


def load_model(
    spec: ModelSpec,
    device: torch.device,
    rank: int,
    tp_size: int,
    report_progress: ReportProgress,
    attention: AttentionKernel = "auto",
) -> LoadedModel:
    """Read the slices of the file that this rank holds, and nothing else of it.

    ``report_progress(done, total)`` is called with bytes now and then. ``attention``: of optimised
    steps.

    Raises:
        CheckpointError: the file is not what it was when the model was chosen.
        RuntimeError: it was changed while it was read.
    """
    try:
        version = file_version(spec.path)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"The model file {spec.path} does not exist, or not on the host of every GPU: it must "
            "lie under the same path on all of them."
        ) from error
    if version != spec.version:
        raise CheckpointError(
            f"The model file {spec.path} was replaced after the model had been chosen. Queue the "
            "prompt again."
        )
    info = inspect_checkpoint(spec.path)
    table, kind = info.sizes.table, info.family.forward()
    compute_dtype, weight_dtype = dtype_of(spec.compute_dtype), dtype_of(spec.weight_dtype)
    with torch.device("meta"):
        model = nn.Module.to(kind.build(info.sizes), compute_dtype)
    for name in table.exact:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    model.requires_grad_(False)
    sharding = Sharding.of(model, table.plan)
    scaled = _scaled_layers(sharding.layers, table.sources, info)
    shard_module(model, sharding, tp_size, weight_dtype, compute_dtype, scaled)

    def parts_of(rank: int) -> list[Part]:
        return sharding.parts(rank, tp_size, table.sources)

    model.to_empty(device=device)
    with open_checkpoint(spec.path) as file:
        reach("load")
        exact = {table.places[name].name for name in table.exact}
        reader = _Reader(file, info.scales, weight_dtype, exact)
        with _copier(device, tp_size) as copy:
            _fill(model, parts_of(rank), reader, copy, report_progress)
        stored = {
            name: StoredWeight(tensor.shape, torch.float32 if name in exact else weight_dtype)
            for name, tensor in info.tensors.items()
        }
        for layer in sharding.layers:
            if layer.path in scaled:
                for name in _stored_weights(layer, table.sources):
                    stored[name] = StoredWeight(
                        info.tensors[name].shape,
                        scaled[layer.path],
                        scale=reader.scale(name),
                        rescaled=info.scales[name].endswith(".weight_scale"),
                    )
        bytes_read = file.bytes_read
    if file_version(spec.path) != spec.version:
        raise RuntimeError(f"The model file {spec.path} was changed while it was read.")
    weights = PatchedWeights(model, stored, parts_of, rank, tp_size, collectives.gather)
    fast = device.type == "cuda" and spec.optimize == "auto"
    reduction = None
    if fast:
        # Here, since without a GPU there may be no Triton.
        from ..gpu.attention import FastAttention
        from ..gpu.reduction import fused_reduction

        reduction = fused_reduction(device)
        fast_attention = FastAttention(attention)
    forward: ShardedForward = kind(model.eval(), info.sizes, collectives, reduction)

    def new_run() -> Callable[..., torch.Tensor]:
        if not fast:
            return forward.evaluate
        capture = functools.partial(collectives.graph_capture, device)
        return RecordedEvaluation(forward.evaluate, capture, fast_attention)

    return LoadedModel(forward, weights, device, new_run, bytes_read)


def _scaled_layers(
    layers: Iterable[Layer], sources: Sources, info: CheckpointInfo
) -> dict[str, torch.dtype]:
    """Layers all of whose weights are stored in one fp8 dtype with a scale, and that dtype."""
    found = {}
    for layer in layers:
        stored = _stored_weights(layer, sources)
        dtypes = {info.tensors[name].dtype for name in stored}
        if stored <= info.scales.keys() and len(dtypes) == 1 and dtypes <= FP8_DTYPES.keys():
            found[layer.path] = FP8_DTYPES[dtypes.pop()]
    return found


def _stored_weights(layer: Layer, sources: Sources) -> set[str]:
    """The names in the file of what the layer's weight is made of."""
    return {source.name for path in layer.replaced for source in sources(f"{path}.weight")}


class _Reader:
    """Reads parts as a parameter holds them: rounded to the weights' dtype, or with a scale."""

    def __init__(
        self,
        file: CheckpointFile,
        scales: Mapping[str, str],
        weight_dtype: torch.dtype,
        exact: Collection[str],
    ) -> None:
        self._file = file
        self._scales = scales
        self._weight_dtype = weight_dtype
        self._exact = exact

    def scale(self, weight: str) -> float:
        """The number that the stored values are to be multiplied by."""
        name = self._scales.get(weight)
        return 1.0 if name is None else self._file.read(name, None, None).float().item()

    def read(self, part: Part, with_scale: bool) -> torch.Tensor:
        """The part's values; ``with_scale``: multiplied, and rounded as all weights are.

        ComfyUI rounds everything to the weights' dtype but what it holds in fp32 (``exact``).
        """
        data = self._file.read(part.source, part.rows, part.columns)
        if not with_scale:
            return data
        if part.source in self._scales:
            data = data.float() * self.scale(part.source)
        return data.to(torch.float32 if part.source in self._exact else self._weight_dtype)


@contextlib.contextmanager
def _copier(device: torch.device, num_ranks: int) -> Iterator[Copy]:
    """What copies a tensor of the file to its place; all have arrived when this ends."""
    if device.type == "cuda":
        with Uploads(device, num_ranks) as uploads:
            yield uploads.copy
    else:
        yield lambda source, place: place.copy_(source)


def _fill(
    model: nn.Module,
    parts: list[Part],
    reader: _Reader,
    copy: Copy,
    report_progress: ReportProgress,
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
        if sum(part.length for part in here) < parameter.shape[here[0].axis]:
            parameter.data.zero_()
        scale = scales.get(f"{name}_scale")
        if scale is not None:
            scale.data.fill_(1.0)
        for part in here:
            place = parameter.data.narrow(part.axis, part.target_start, part.length)
            copy(reader.read(part, with_scale=scale is None), place)
            if scale is not None:
                rows = scale if part.axis else scale.narrow(0, part.target_start, part.length)
                rows.data.fill_(reader.scale(part.source))
        done += parameter.nbytes
        if time.monotonic() - reported > PROGRESS_INTERVAL_S:
            report_progress(done, total)
            reported = time.monotonic()
    report_progress(total, total)
