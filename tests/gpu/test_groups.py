"""Groups of several GPUs, in every layout, against one GPU that computes as it is written.

Whole groups through the runtime: NCCL, also in 8 bits, or memory that the ranks share, recorded
graphs, batch groups, ranks that share tokens. On a machine with fewer GPUs the ranks share the
first one (``TP_RUNTIME_TEST_ONE_GPU``; NCCL 2.30 or newer): they take turns, so the time of a step
means nothing there, but its results are those of the same kernels on the same parts.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu.conftest import FAMILIES, FP32_TOLERANCE, ONE_AT_A_TIME, relative_error
from torch.utils import _pytree as pytree

from bench.dummy import dummy_file, sizes_of
from bench.extents import Extent
from bench.inputs import make_inputs, of_step
from bench.step import flat
from tp_runtime.client import GroupConfig, Layout, ModelSpec, Runtime
from tp_runtime.models import family_named

pytestmark = pytest.mark.gpu

NCCL_OF_ONE_GPU = 23000  # 2.30
LAYOUTS = ("2x1", "3x1", "4x1", "1x2x1", "1x3x1", "2x2x1", "1x2", "2x2", "1x2x2")
# How the ranks add up and exchange: as where NVLink connects them, or as where nothing does (which
# NCCL_P2P_DISABLE makes of a machine that has it).
WAYS = ("shared memory", "NCCL", "8 bits")
EIGHT_BIT_TOLERANCE = 3e-2
# bf16: parts of sums are rounded for themselves.
BF16_FACTOR = 1.25


def nccl_version() -> int:
    """Of the library that is loaded; torch says which one it was built with."""
    version = ctypes.c_int()
    ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    return version.value


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in LAYOUTS],
)
def layout(request: pytest.FixtureRequest) -> Layout:
    return Layout.parse(request.param)


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runtime(
    way: str, layout: Layout, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runtime]:
    """One whose groups compute so; ends them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", str(tmp_path_factory.mktemp("home")))
        if torch.cuda.device_count() < layout.num_gpus:
            if nccl_version() < NCCL_OF_ONE_GPU:
                pytest.skip(f"needs {layout.num_gpus} GPUs, or NCCL 2.30")
            patch.setenv("TP_RUNTIME_TEST_ONE_GPU", str(layout.num_gpus))
            overlap = "1" if way == "shared memory" else "0"
            patch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", overlap)
        elif way != "shared memory":
            patch.setenv("NCCL_P2P_DISABLE", "1")
        runtime = Runtime()
        yield runtime
        runtime.release()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    """One GPU, as it is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", str(tmp_path_factory.mktemp("home")))
        runtime = Runtime()
        yield runtime
        runtime.release()


def inputs_of(family: str, batch: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Of three steps: as it is written, recorded and replayed."""
    extent = Extent(160, 96, min(Extent.usual(family_named(family))[0].frames, 9))
    inputs = make_inputs(family, sizes_of(family, small=True), extent, batch)
    of_dtype = {
        name: value
        if name == "timesteps"
        else pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), value)
        for name, value in inputs.items()
    }

    return [of_step(of_dtype, step) for step in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts(
    runtime: Runtime, written: Runtime, layout: Layout, way: str, family: str, tmp_path_factory: Any
) -> None:
    if layout.sequence_size > 1 and not family_named(family).shares_tokens:
        pytest.skip("does not share tokens")
    path = dummy_file(family, Path(tmp_path_factory.getbasetemp()), small=True)
    group = GroupConfig.of_layout(layout)
    precision = "fast" if way == "8 bits" else "exact"
    one_gpu = GroupConfig.of_layout(Layout(1))
    batches = (1, 2) if layout.batch_groups == 1 else (1, 3)
    if family in ONE_AT_A_TIME:
        batches = (1,)

    def evaluate(on: GroupConfig, dtype: str, batch: int) -> list[torch.Tensor]:
        is_reference = on is one_gpu
        optimize = "off" if is_reference else "auto"
        spec = ModelSpec.of(str(path), dtype, dtype, optimize, precision=precision)
        model = (written if is_reference else runtime).model(spec, on)
        model.ensure_loaded()
        inputs = inputs_of(family, batch, getattr(torch, dtype))
        return [flat(model.evaluate(one)).cpu() for one in inputs]

    for batch in batches:
        exact = evaluate(one_gpu, "float32", batch)
        pairs = zip(evaluate(group, "float32", batch), exact, strict=True)
        errors = [relative_error(*pair) for pair in pairs]
        print(f"ERROR {layout} {way} {family} batch {batch} fp32 {max(errors):.1e}")
        if precision == "exact" or layout.num_gpus == layout.batch_groups:
            assert max(errors) <= FP32_TOLERANCE, errors
        else:
            assert min(errors) > FP32_TOLERANCE
            assert max(errors) < EIGHT_BIT_TOLERANCE, errors
    if precision == "fast":
        return
    pairs = zip(evaluate(one_gpu, "bfloat16", batch), exact, strict=True)
    noise = max(relative_error(*pair) for pair in pairs)
    pairs = zip(evaluate(group, "bfloat16", batch), exact, strict=True)
    error = max(relative_error(*pair) for pair in pairs)
    print(f"ERROR {layout} {way} {family} batch {batch} bf16 {error:.1e} of {noise:.1e}")
    assert error <= BF16_FACTOR * noise
