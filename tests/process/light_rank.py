"""A rank that computes nothing: everything about it is real but vLLM and the model.

It starts in a third of the time, and does what `transformer_options` tells it to, so that a test
can put a fault at a known place: `{"rank": 1, "sleep_s": 5}`, `{"rank": 0, "raise": "text"}`,
`{"rank": 0, "exit": 3}`, `{"rank": 0, "refuse": "text"}`, `{"rank": 0, "allocate": True}`,
`{"rank": 0, "send": b"frame"}` or `{"rank": 0, "print": "text"}`. `{"while": path}` waits
while that file is there. Without `rank`, every rank does it. What is false (`""`, 0) is not done.

Where a GPU's stream would wait for a number in memory, this rank itself does.
"""

import contextlib
import ctypes
import importlib
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from tp_runtime.config import ModelSpec, WorkerConfig
from tp_runtime.errors import InputError
from tp_runtime.fault_points import OUT_OF_MEMORY, reach
from tp_runtime.rank.host_copy import PartMemory
from tp_runtime.wire import stream_wait

_control_fd = -1


@contextlib.contextmanager
def _group(config: WorkerConfig) -> Iterator[int]:
    global _control_fd
    _control_fd = config.control_fd
    yield config.tp_size


def _load(
    spec: ModelSpec,
    device: torch.device,
    rank: int,
    tp_size: int,
    report_progress: Callable[[int, int], None],
    attention: str,
    kernel_choices: str,
    limit: int | None,
    part_memory: PartMemory | None,
) -> SimpleNamespace:
    shapes = set()

    def forward(inputs: Mapping[str, Any], *_: object) -> torch.Tensor | list[torch.Tensor]:
        x, more = inputs["x"], inputs["context"].sum()
        shape = x.shape if isinstance(x, torch.Tensor) else x[0].shape
        if shape not in shapes:
            shapes.add(shape)
            reach("compile")
        order = inputs.get("transformer_options") or {}
        if order.get("rank") in (None, rank):
            time.sleep(order.get("sleep_s", 0))
            while os.path.exists(order.get("while", "")):  # noqa: PTH110
                time.sleep(0.001)
            if order.get("exit"):
                os._exit(order["exit"])
            if order.get("send"):
                os.write(_control_fd, order["send"])
            if order.get("print"):
                print(order["print"], flush=True)
            if order.get("raise"):
                raise RuntimeError(order["raise"])
            if order.get("allocate"):
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            if order.get("refuse"):
                raise InputError(order["refuse"])
        if isinstance(x, torch.Tensor):
            return x * 2 + more
        return [one * 2 + more + inputs["a_timestep"].sum() for one in x]

    reach("load")
    for part in range(4):
        report_progress(25 * part, 100)
        time.sleep(0.05)
    return SimpleNamespace(
        forward=forward,
        resident_bytes=100,
        streamed_bytes=0,
        bytes_read=100,
        asleep=False,
        num_patched=0,
        precision="exact",
        sleep=lambda: None,
        wake=lambda: None,
        close=lambda: None,
    )


def _until(_: torch.device, address: int, value: int) -> None:
    while ctypes.c_uint32.from_address(address).value < value:
        time.sleep(0.0005)


def _write(_: torch.device, address: int, value: int) -> None:
    ctypes.c_uint32.from_address(address).value = value


def _mark(_: torch.device) -> SimpleNamespace:
    now = time.monotonic()
    return SimpleNamespace(
        query=lambda: True,
        synchronize=lambda: None,
        elapsed_time=lambda later: 1000 * (later.now - now),
        now=now,
    )


def be_light() -> None:
    """Have this process, and the ranks forked from it, import and compute nothing."""
    membership = types.ModuleType("tp_runtime.rank.membership")
    membership.select_device = lambda _: torch.device("cpu")  # type: ignore[attr-defined]
    membership.tensor_parallel_group = _group  # type: ignore[attr-defined]
    membership.versions = dict  # type: ignore[attr-defined]
    loading = types.ModuleType("tp_runtime.rank.loading")
    loading.load_model = _load  # type: ignore[attr-defined]
    loading.ReportProgress = object  # type: ignore[attr-defined]
    loaded_model = types.ModuleType("tp_runtime.rank.loaded_model")
    loaded_model.LoadedModel = loaded_model.Shard = SimpleNamespace  # type: ignore[attr-defined]
    model_patches = types.ModuleType("tp_runtime.rank.model_patches")
    model_patches.LoadedPatch = SimpleNamespace  # type: ignore[attr-defined]
    collectives = types.ModuleType("tp_runtime.gpu.collectives")
    collectives.meet = lambda: None  # type: ignore[attr-defined]
    stream_wait.until, stream_wait.write, stream_wait.mark = _until, _write, _mark  # type: ignore[assignment]
    for module in (membership, loading, loaded_model, model_patches, collectives):
        sys.modules[module.__name__] = module
        room, _, name = module.__name__.rpartition(".")
        setattr(importlib.import_module(room), name, module)
