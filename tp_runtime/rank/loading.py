"""Builds a rank's shard of a model: module tree, parallel layers, weights from the file."""

import contextlib
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config import AttentionKernel, ModelSpec, Precision, file_version, quantised_products
from ..errors import CheckpointError
from ..fault_points import reach
from ..formats import QuantisedWeight
from ..gpu import collectives
from ..gpu.eight_bit import EightBitCollectives
from ..gpu.graphs import RecordedEvaluation
from ..models.forward import Collectives, Memo, Prediction, ShardedForward, memo_bytes
from ..recognise import CheckpointInfo, inspect_checkpoint, open_checkpoint
from ..sharding.parts import Part, Sharding
from ..sharding.quantisation import Quantisation, sharded, stored_weights
from ..sharding.streaming import StreamingPlan
from ..wire.exchange import dtype_of
from .agreement import beyond_refusing, largest_of_batch_group, least_of_all, refused_together
from .host_copy import PartMemory
from .loaded_model import LoadedModel
from .parallel_layers import shard_module
from .patched_weights import PatchedWeights, StoredWeight
from .reading import Reader
from .streamed_layers import give_memory, plan_for
from .uploading import Uploads

if TYPE_CHECKING:
    from ..gpu.attention import FastAttention

logger = logging.getLogger("tp_runtime.rank.loading")

PROGRESS_INTERVAL_S = 0.05

ReportProgress = Callable[[int, int], None]
Copy = Callable[[torch.Tensor, torch.Tensor], object]  # source on the CPU, place on the device


def load_model(
    spec: ModelSpec,
    device: torch.device,
    rank: int,
    tp_size: int,
    report_progress: ReportProgress,
    attention: AttentionKernel = "auto",
    kernel_choices: str = "",
    limit: int | None = None,
    part_memory: PartMemory | None = None,
) -> LoadedModel:
    """Read the slices of the file that this rank holds, and nothing else of it.

    ``report_progress(done, total)`` is called with bytes now and then. ``attention``: of optimised
    steps. ``kernel_choices``: see ``WorkerConfig``. ``limit``: bytes of weights that the device may
    hold; None: all. ``part_memory``: the host memory of the ranks that hold the same; None: each
    has its own.

    Raises:
        CheckpointError: the file is not what it was when the model was chosen, on some rank.
        SizeError: the device of some rank cannot hold what of it cannot be streamed.
        InputError: ``attention`` is a kernel that some rank's device has not.
        RuntimeError: it was changed while it was read, or cannot be read.
    """
    fast = device.type == "cuda" and spec.optimize == "auto"
    products = fast and quantised_products()
    with refused_together():
        outline = _outline(spec, tp_size, products, limit)
        fast_attention = _fast_attention(attention, kernel_choices) if fast else None
        reach("load")
    info, model, exact = outline.info, outline.model, outline.exact
    sharding, quantisation = outline.sharding, outline.quantisation
    table, weight_dtype = info.sizes.table, dtype_of(spec.weight_dtype)
    if rank == 0:
        _log_quantisation(spec.path, quantisation, device)
        if spec.fp8_products and not products:
            logger.info(
                "%s: fp8_e4m3fn_fast multiplies in %s here, not in fp8: see "
                "TP_RUNTIME_QUANTISED_PRODUCTS.",
                spec.path,
                spec.compute_dtype,
            )

    def parts_of(rank: int) -> list[Part]:
        return quantisation.parts(sharding, rank, tp_size, table.sources)

    streamed = give_memory(model, device, outline.streaming, part_memory)
    in_host = frozenset() if streamed is None else streamed.memory.tensors.keys()
    if streamed is not None and rank == 0:
        logger.info(
            "%s: %.2f GiB of each rank's weights stay in the host's memory, since its device may "
            "hold %.2f GiB of them",
            spec.path,
            streamed.memory.nbytes / 2**30,
            (limit or 0) / 2**30,
        )
    with beyond_refusing(), open_checkpoint(spec.path) as file:
        reach("read")
        reader = Reader(file, quantisation, weight_dtype, exact)
        with _copier(device, tp_size) as copy:
            others = in_host if part_memory is not None and not part_memory.leads else frozenset()
            _fill(model, parts_of(rank), reader, copy, report_progress, others)
        bytes_read = file.bytes_read
        stored = {
            name: StoredWeight(
                tensor.shape,
                torch.float32 if name in exact else weight_dtype,
                input_scale=reader.input_scale(name),
            )
            for name, tensor in info.tensors.items()
        }
    if part_memory is not None:
        part_memory.meet()
    for layer in sharding.layers:
        if layer.path in quantisation.held:
            for name in stored_weights(layer, table.sources):
                stored |= _quantised(name, info.tensors[name].shape, info.quantised[name])
    if file_version(spec.path) != spec.version:
        raise RuntimeError(f"The model file {spec.path} was changed while it was read.")
    weights = PatchedWeights(
        model,
        stored,
        parts_of,
        rank,
        tp_size,
        collectives.gather,
        device,
        part_memory=part_memory,
        in_host=in_host,
    )
    reduction = None
    if fast:
        # Here, since without a GPU there may be no Triton.
        from ..gpu.reduction import fused_reduction

        reduction = fused_reduction(device)
    eight_bit = EightBitCollectives(device, fast) if spec.precision == "fast" else None
    shared: Collectives = eight_bit or collectives
    kind = info.family.forward()
    forward: ShardedForward = kind(model.eval(), info.sizes, shared, reduction)

    limit_bytes = least_of_all(memo_bytes(device))  # GPUs need not be alike
    evaluate = forward.evaluate if streamed is None else streamed.stream.passes(forward.evaluate)
    precision: Precision = "exact"
    if eight_bit is not None and eight_bit.rounds:
        precision, evaluate = "fast", eight_bit.during(evaluate)

    def new_run() -> Callable[..., Prediction]:
        if fast_attention is None:
            return evaluate
        capture = functools.partial(collectives.graph_capture, device)
        return RecordedEvaluation(
            evaluate, capture, fast_attention, limit_bytes, largest_of_batch_group
        )

    def new_memo() -> Memo:
        return Memo(limit_bytes, largest_of_batch_group)

    return LoadedModel(
        forward,
        weights,
        device,
        new_run,
        new_memo,
        bytes_read,
        streamed=streamed,
        precision=precision,
        part_memory=part_memory,
    )


@dataclass(frozen=True)
class _Outline:
    """What a rank knows of a model before it takes memory for it.

    ``model``: the rank's shard, on the meta device. ``exact``: what is held in fp32, by the names
    in the file. ``streaming``: which layers stay with the host, if any do.
    """

    info: CheckpointInfo
    model: nn.Module
    sharding: Sharding
    quantisation: Quantisation
    exact: frozenset[str]
    streaming: StreamingPlan | None


def _outline(spec: ModelSpec, tp_size: int, products: bool, limit: int | None) -> _Outline:
    """Look at the file; raises CheckpointError and SizeError.

    ``products``: whether quantised weights are multiplied as they are. ``limit``: bytes of weights
    that the device may hold.
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
    compute_dtype = dtype_of(spec.compute_dtype)
    with torch.device("meta"):
        model = nn.Module.to(kind.build(info.sizes), compute_dtype)
    for name in table.exact:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.float()
    model.requires_grad_(False)
    sharding, quantisation = sharded(model, table.plan, table.sources, info.quantised, tp_size)
    shard_module(
        model,
        sharding,
        tp_size,
        dtype_of(spec.weight_dtype),
        compute_dtype,
        quantisation.held,
        fast=products,
        fast_plain=products and spec.fp8_products,
    )
    exact = frozenset(table.places[name].name for name in table.exact)
    streaming = plan_for(model, sharding, table, info.label, limit)
    return _Outline(info, model, sharding, quantisation, exact, streaming)


def _fast_attention(kernel: AttentionKernel, kernel_choices: str) -> "FastAttention":
    """Raises InputError: there is no such kernel here."""
    # Here, since without a GPU there may be no Triton.
    from ..gpu.attention import FastAttention
    from ..gpu.kernel_choices import KernelChoices

    choices = KernelChoices(Path(kernel_choices)) if kernel_choices else None
    return FastAttention(kernel, choices)


def _log_quantisation(path: str, quantisation: Quantisation, device: torch.device) -> None:
    """Say once how a file's quantised weights are held and multiplied."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    counts = Counter(
        f"{layer_format.label} ({layer_format.compute(capability, quantised_products())})"
        for layer_format in quantisation.held.values()
    )
    counts += Counter(f"held dequantised, as {why}" for why in quantisation.dequantised.values())
    for what, count in counts.items():
        logger.info("%s: %d layers %s", path, count, what)


def _quantised(
    name: str, shape: tuple[int, ...], weight: QuantisedWeight
) -> dict[str, StoredWeight]:
    """How a shard holds a quantised weight and its companions."""
    rows, columns = shape
    storage = weight.format.storage
    found = {name: StoredWeight((rows, columns // storage.packed), storage.dtype, weight)}
    for kind, stored in weight.tensors.items():
        whole = tuple(weight.format.companion_shape(kind, (rows, columns)))
        found[stored] = StoredWeight(whole, weight.format.companion_dtype(kind))
    return found


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
    reader: Reader,
    copy: Copy,
    report_progress: ReportProgress,
    others: Collection[str] = (),
) -> None:
    """Copy every part to its place; what no part covers is padding and becomes zero.

    But for the parameters that lie in memory which one of the ``others`` fills.
    """
    parameters = dict(model.named_parameters())
    total = sum(one.nbytes for name, one in parameters.items() if name not in others)
    by_target: dict[str, list[Part]] = {}
    for part in parts:
        by_target.setdefault(part.target, []).append(part)
    assert by_target.keys() <= parameters.keys(), by_target.keys() - parameters.keys()
    done, reported = 0, 0.0
    for name, parameter in parameters.items():
        if name in others:
            continue
        here = by_target.get(name, [])  # none: all of it pads
        if not here or sum(part.length for part in here) < parameter.shape[here[0].axis]:
            parameter.data.zero_()
        for part in here:
            copy(
                reader.read(part), parameter.data.narrow(part.axis, part.target_start, part.length)
            )
        done += parameter.nbytes
        if time.monotonic() - reported > PROGRESS_INTERVAL_S:
            report_progress(done, total)
            reported = time.monotonic()
    report_progress(total, total)
