"""Carries out requests on one rank: loads shards, holds constant tensors, evaluates."""

import ctypes
import gc
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import torch
from torch import nn

from ..config import MODEL_PATCHES, PER_EVALUATION_INPUTS, WorkerConfig
from ..errors import InputError
from ..fault_points import reach
from ..gpu import collectives
from ..gpu.speeds import host_times, speed_times
from ..wire import stream_wait
from ..wire.exchange import Exchange
from ..wire.protocol import (
    Evaluate,
    FillModelPatch,
    Hold,
    Load,
    LoadModelPatch,
    MeasureLink,
    Patch,
    Report,
    Request,
    Sleep,
    TensorRef,
    Unload,
    Wake,
)
from .agreement import refused_together
from .host_copy import PartMemory
from .loaded_model import LoadedModel, Shard
from .loading import ReportProgress, load_model
from .model_patches import LoadedPatch
from .streamed_layers import limit_of


class UnderWay:
    """An evaluation that the GPU has begun, or will once its inputs are there."""

    def __init__(
        self, num_bad: torch.Tensor, start: torch.cuda.Event, device: torch.device
    ) -> None:
        """After the last of it was put into the device's current stream.

        ``start``: when its inputs were there.
        """
        self._num_bad = num_bad
        self._start, self._end = start, stream_wait.mark(device)

    def is_over(self) -> bool:
        return self._end.query()

    def wait(self) -> tuple[tuple[int, int], float]:
        """For its end: the value of its ``Done``, and how many milliseconds the GPU took."""
        self._end.synchronize()
        return _numbers_of(self._num_bad), self._start.elapsed_time(self._end)


class Runner:
    """The state of a rank between requests."""

    def __init__(self, config: WorkerConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._exchange = Exchange(config.exchange_fd)
        self._part_memory = None
        if config.part_fd >= 0:
            leads = config.rank == config.tp_rank  # the first with this part
            self._part_memory = PartMemory(config.part_fd, leads, collectives.meet)
        self._models: dict[str, LoadedModel] = {}
        self._patches: dict[str, LoadedPatch] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._factors: dict[int, torch.Tensor] = {}  # of patches, in the host's memory
        self._num_evaluations, self._evaluation_ms = 0, 0.0

    def device_name(self) -> str:
        """``"cpu"``, or the GPU's index and product name."""
        if self._device.type == "cpu":
            return "cpu"
        return f"{self._device} {torch.cuda.get_device_name(self._device)}"

    @torch.inference_mode()
    def handle(self, request: Request, report_progress: ReportProgress) -> Any:
        """Carry out one request; the result is the ``value`` of its ``Done``.

        Or an ``UnderWay``, if the request is one in stream order.

        Raises:
            InputError, CheckpointError, SizeError: refused, by every rank of the group; nothing
                has changed.
        """
        match request:
            case Load():
                return self._load(request, report_progress)
            case LoadModelPatch():
                return self._load_patch(request)
            case FillModelPatch():
                self._exchange.remap(request.exchange_bytes)
                tensors = {name: self._exchange.view(ref) for name, ref in request.tensors.items()}
                return self._patches[request.model].fill(tensors)
            case Unload():
                self._held.clear()
                self._unload(request.model)
                self._drop_factors(request.drop)
                return None
            case Evaluate():
                return self._evaluate(request)
            case Hold():
                return self._hold(request)
            case Patch():
                return self._patch(request)
            case Sleep():
                reach("sleep")
                self._held.clear()
                self._forget_patch(request.model)
                self._shard(request.model).sleep()
                return self._free_cache()
            case Wake():
                return self._shard(request.model).wake()
            case Report():
                return self._report(request.digests)
            case MeasureLink():
                times: dict[str, Any] = collectives.link_times(self._device)
                if self._device.type == "cuda":  # of the CPU nothing is predicted
                    # Right after the others, so that all ranks read at once.
                    times["host"] = host_times(self._device)
                    times["speed"] = speed_times(self._device)
                self._free_cache()
                return times
        raise AssertionError(f"unknown request {request}")

    def _load(self, request: Load, report_progress: ReportProgress) -> dict[str, Any]:
        model = self._models.get(request.model)
        if model is None:
            model = load_model(
                request.spec,
                self._device,
                self._config.tp_rank,
                self._config.tp_size,
                report_progress,
                self._config.attention,
                os.fsdecode(self._config.kernel_choices),
                limit_of(self._device, request.weight_limit, request.computed_bytes),
                self._part_memory,
            )
            self._models[request.model] = model
        return {
            "resident_bytes": model.resident_bytes,
            "streamed_bytes": model.streamed_bytes,
            "bytes_read": model.bytes_read,
        }

    def _load_patch(self, request: LoadModelPatch) -> dict[str, Any]:
        self._unload(request.model)  # what an abandoned call has begun to fill
        config = self._config
        place = self._device, config.tp_rank, config.tp_size, self._part_memory
        patch = LoadedPatch(request.spec, *place)
        self._patches[request.model] = patch
        return {"resident_bytes": patch.resident_bytes, "bytes_read": patch.bytes_read}

    def _forget_patch(self, name: str) -> None:
        """If it is a model patch, models must not replay what was recorded with its weights."""
        if name in self._patches:
            for model in self._models.values():
                model.forget()

    def _unload(self, name: str) -> None:
        reach("unload")
        self._forget_patch(name)
        shard = self._models.pop(name, None) or self._patches.pop(name, None)
        if shard is not None:
            shard.close()
        del shard
        gc.collect()  # a model holds itself: its forward has what was recorded of it
        self._free_cache()

    def _free_cache(self) -> None:
        """Give what nothing uses back to the GPU and to the host."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep up to a model's shard

    def _loaded(self, name: str) -> LoadedModel:
        model = self._models.get(name)
        if model is None:
            raise InputError(f"The model {name} is not loaded on the process group.")
        return model

    def _shard(self, name: str) -> Shard:
        return self._patches[name] if name in self._patches else self._loaded(name)

    def _patch_module(self, name: str) -> nn.Module:
        if name not in self._patches:
            raise InputError(f"The model patch {name} is not loaded on the process group.")
        return self._patches[name].module

    def _hold(self, request: Hold) -> None:
        self._exchange.remap(request.exchange_bytes)
        for ref in request.tensors:
            self._factors[ref.key] = self._exchange.view(ref).clone()

    def _drop_factors(self, keys: Iterable[int]) -> None:
        for key in keys:
            del self._factors[key]

    def _patch(self, request: Patch) -> None:
        self._drop_factors(request.drop)  # also if the rest is refused: they are never named again
        model = self._loaded(request.model)
        with refused_together():
            model.weights.check(request.weights)
        model.patch(request.weights, self._factors)

    def _evaluate(self, request: Evaluate) -> tuple[int, int] | UnderWay:
        """How many values are NaN or infinite: of the latents, and of the results made of them.

        None of what another rank gives the results of.
        """
        started = time.perf_counter()
        reach("evaluate")
        # Before anything can be refused: the engine takes it that these are held from now on.
        self._exchange.remap(request.exchange_bytes)
        if request.in_stream_order:
            self._exchange.await_inputs(self._device, request.call)
            start = stream_wait.mark(self._device)
        found: dict[TensorRef, torch.Tensor] = {}
        resolved = [self._resolve(evaluation.inputs, found) for evaluation in request.evaluations]
        for key in request.drop:
            del self._held[key]
        num_bad = torch.zeros(2, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        try:
            model = self._loaded(request.model)
            mine = self._config.batch_group
            if mine < len(resolved):
                evaluation = request.evaluations[mine]
                if listed := resolved[mine].get(MODEL_PATCHES):
                    names = [one["name"] for one in listed]
                    model.forward.model_patches = {name: self._patch_module(name) for name in names}
                output = model.forward(resolved[mine], _conditioning_key(evaluation.inputs))
                if self._config.gives_results:
                    self._give(output, evaluation.results)
                    _count_bad(num_bad, resolved[mine]["x"], output)
        except BaseException:
            self._end(request)
            raise
        if request.in_stream_order:
            if self._config.gives_results:
                group = self._config.batch_group
                self._exchange.say_given_later(self._device, group, request.call)
            return UnderWay(num_bad, start, self._device)
        self._end(request)
        self._note_time((time.perf_counter() - started) * 1000)
        return _numbers_of(num_bad)

    def wait_for(self, evaluation: UnderWay) -> tuple[int, int]:
        """The ``value`` of its ``Done``, when it is over."""
        value, milliseconds = evaluation.wait()
        self._note_time(milliseconds)
        return value

    def _note_time(self, milliseconds: float) -> None:
        self._num_evaluations += 1
        self._evaluation_ms += milliseconds

    def _end(self, request: Evaluate) -> None:
        """Wait for what the device computes, and say that results are there, or never will be."""
        # Of a refused request, too, the inputs must have left the exchange memory.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._config.gives_results:
            self._exchange.say_given(self._config.batch_group, request.call)

    def _give(
        self, output: torch.Tensor | Sequence[torch.Tensor], refs: Sequence[TensorRef]
    ) -> None:
        outputs = [output] if isinstance(output, torch.Tensor) else output
        for one, ref in zip(outputs, refs, strict=True):
            result = self._exchange.view(ref)
            assert (one.shape, one.dtype) == (result.shape, result.dtype), (
                f"{one.shape} {one.dtype}, not {result.shape} {result.dtype}"
            )
            result.copy_(one, non_blocking=True)

    def _resolve(self, value: Any, found: dict[TensorRef, torch.Tensor]) -> Any:
        """``value`` with every reference replaced by its tensor, on the rank's device.

        ``found``: of the request's references so far. What several stand for is one tensor.
        """
        if isinstance(value, TensorRef):
            if value not in found:
                found[value] = self._tensor(value)
            return found[value]
        if isinstance(value, dict):
            return {key: self._resolve(item, found) for key, item in value.items()}
        if isinstance(value, list):
            return [self._resolve(item, found) for item in value]
        return value

    def _tensor(self, ref: TensorRef) -> torch.Tensor:
        if ref.offset < 0:
            return self._held[ref.key]
        # A copy, also on the CPU: held tensors outlive the exchange memory's content.
        tensor = self._exchange.view(ref).to(self._device, non_blocking=True, copy=True)
        if ref.key:
            self._held[ref.key] = tensor
        return tensor

    def _report(self, digests: bool) -> dict[str, Any]:
        memory: dict[str, int] = {}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            allocated = torch.cuda.memory_allocated(self._device)
            memory = {
                "allocated_bytes": allocated,
                "peak_bytes": torch.cuda.max_memory_allocated(self._device),
                "free_bytes": free
                + torch.cuda.memory_reserved(self._device)
                - allocated
                - _kept_for_graphs(),
                "total_bytes": total,
            }
        return {
            "device": self.device_name(),
            "memory": memory,
            "peer_access": collectives.peer_access() if self._device.type == "cuda" else None,
            "models": {
                name: {
                    "resident_bytes": model.resident_bytes,
                    "streamed_bytes": model.streamed_bytes,
                    "bytes_read": model.bytes_read,
                    "asleep": model.asleep,
                    "patched_weights": model.num_patched,
                    "precision": model.precision,
                    **({"digest": model.digest()} if digests else {}),
                }
                for name, model in (self._models | self._patches).items()
            },
            "evaluations": self._num_evaluations,
            "evaluation_ms": self._evaluation_ms,
        }


def _count_bad(places: torch.Tensor, *groups: torch.Tensor | Sequence[torch.Tensor]) -> None:
    """Values that are no numbers, of each of the groups; there when the device has counted them."""
    for place, tensors in zip(places, groups, strict=True):
        each = [tensors] if isinstance(tensors, torch.Tensor) else tensors
        # The difference is zero where a value is finite.
        num_bad = sum(torch.count_nonzero(one - one) for one in each)
        place.copy_(torch.as_tensor(num_bad), non_blocking=True)


def _numbers_of(num_bad: torch.Tensor) -> tuple[int, int]:
    of_latents, of_results = num_bad.tolist()
    return of_latents, of_results


def _kept_for_graphs() -> int:
    """Bytes of this process's GPU that lie idle, and only recorded evaluations can take."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _conditioning_key(inputs: dict[str, Any]) -> bytes:
    """Equal for requests that differ in nothing but what changes at every evaluation."""

    def by_name(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return ["tensor", value.key]
        if isinstance(value, dict):
            return {name: by_name(item) for name, item in value.items()}
        if isinstance(value, list):
            return [by_name(item) for item in value]
        return value

    constant = {k: by_name(v) for k, v in inputs.items() if k not in PER_EVALUATION_INPUTS}
    return msgspec.msgpack.encode(constant)
