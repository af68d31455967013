"""What the loaders share: the inputs that say how and where a model runs, and what those mean."""

from typing import Any

import comfy.model_management as management
import torch
from comfy.cli_args import PerformanceFeature, args
from comfy_api.latest import io

from ..tp_runtime.client import (
    OPTIMIZE,
    PRECISIONS,
    WHERE,
    GroupStartError,
    Precision,
    TPRuntimeError,
    checkpoint_info,
    file_version,
    prepare_start,
)
from .gpu_count import CHOICES, choose_group
from .layouts import LAYOUTS
from .model import load_model
from .notices import warn_of_rounding, warn_of_streaming, warnings_of_node
from .patcher import TPModelPatcher
from .placement import AUTO, EXACT, HERE, Placement
from .schema import advanced, check_choice

# Choice → what weights are held in, and whether fp8 weights are multiplied in fp8. Those of fp8 are
# the stock loader's.
_DTYPES = {
    "default": (None, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
    "fp8_e4m3fn": (torch.float8_e4m3fn, False),
    "fp8_e4m3fn_fast": (torch.float8_e4m3fn, True),
    "fp8_e5m2": (torch.float8_e5m2, False),
}


def choices() -> list[io.Input]:
    """The inputs after the file: how its weights are held, and where the model runs.

    None is required, so that a prompt of a stock loader runs when only the node's type is changed.
    """
    return [
        io.Combo.Input(
            "weight_dtype",
            options=list(_DTYPES),
            default="default",
            optional=True,
            tooltip=(
                "What the weights are held in on the GPUs. 'default' chooses as the stock "
                "loader does: usually what the file has, if the GPU can compute in it. "
                "'fp8_e4m3fn_fast' also multiplies in fp8, if the GPU can and "
                "TP_RUNTIME_QUANTISED_PRODUCTS is not off. Quantised weights (int8, scaled fp8, "
                "…) stay as they are in any case."
            ),
        ),
        io.Combo.Input(
            "gpu_count",
            options=list(CHOICES),
            default=AUTO,
            optional=True,
            tooltip=(
                "Over how many GPUs the model is split. 'auto' takes as many of this "
                "machine's GPUs as the model can be split over, if more are not slower. "
                "Without a GPU, the model runs in as many CPU processes ('auto': 1)."
            ),
        ),
        advanced(
            io.String.Input(
                "devices",
                default="",
                optional=True,
                tooltip=(
                    "Which GPUs the model may be on, by number, such as 0,2,3. As many as "
                    "gpu_count says are taken: the fastest, and of those as fast the first "
                    "of the list. Empty: all."
                ),
            )
        ),
        advanced(
            io.Combo.Input(
                "optimize",
                options=list(OPTIMIZE),
                default="auto",
                optional=True,
                tooltip=(
                    "'auto': on GPUs, fused kernels, and a step whose sizes repeat is "
                    "recorded once and replayed. 'off': every operation as it is written, "
                    "slower, to find out whether a fault comes from that."
                ),
            )
        ),
        advanced(
            io.Combo.Input(
                "layout",
                options=list(LAYOUTS),
                default=AUTO,
                optional=True,
                tooltip=(
                    "How the GPUs share the work. 'tp' (tensor parallelism): each holds a part "
                    "of the model. '2x2' (TP size x batch groups): two groups of two GPUs, each "
                    "with the whole model, which divide batches and the two halves of CFG (data "
                    "parallelism). '1x2x1' (TP size x sequence size x batch groups): two GPUs, "
                    "each with the whole model, which divide the tokens of every picture "
                    "(sequence parallelism, Ulysses). "
                    "'auto' takes what is the fastest, by the steps measured so far "
                    "and by predictions."
                ),
            )
        ),
        advanced(
            io.Combo.Input(
                "where",
                options=list(WHERE),
                default=HERE,
                optional=True,
                tooltip=(
                    "On whose GPUs. 'ray': those of a Ray cluster, which may have several "
                    "machines; its address is TP_RUNTIME_RAY_ADDRESS in ComfyUI's "
                    "environment. The model file must have the same path on all of them. "
                    "Needs Ray in the GPU processes' Python."
                ),
            )
        ),
        advanced(
            io.Combo.Input(
                "precision",
                options=list(PRECISIONS),
                default=EXACT,
                optional=True,
                tooltip=(
                    "What the GPUs send to one another. 'exact': numbers as they are. 'fast': in "
                    "8 bits, which is faster where no NVLink connects the GPUs, and changes "
                    "results a little (docs/scaling.md has by how much). With NVLink both are the "
                    "same."
                ),
            )
        ),
    ]


def fingerprint(
    path: str | None,
    *,
    gpu_count: str | None = AUTO,
    devices: str | None = "",
    layout: str | None = AUTO,
    where: str | None = HERE,
    precision: Precision | None = EXACT,
    weight_dtype: str | None = "default",
    **_: Any,
) -> str:
    """Another value when the file has been replaced by another of the same name.

    And when 'auto' has come to mean another group. An input that another node gives is None.
    """
    if path is None:
        return "missing"
    version = file_version(path)
    if gpu_count is None or devices is None or layout is None or where is None or precision is None:
        return f"{path} {version}"
    placement = Placement(gpu_count, devices, layout, where, precision)
    try:
        info = checkpoint_info(path)
        dtype, _ = _DTYPES.get(weight_dtype or "default", (None, False))
        group = choose_group(placement, info, lambda _: None, _stop_if_cancelled, dtype)
    except (TPRuntimeError, ValueError):  # whatever runs with it raises it
        return f"{path} {version}"
    return f"{path} {version} {group}"


def load(
    node_id: str | None,
    name: str,
    path: str,
    *,
    weight_dtype: str = "default",
    gpu_count: str = AUTO,
    devices: str = "",
    optimize: str = "auto",
    layout: str = AUTO,
    where: str = HERE,
    precision: Precision = EXACT,
) -> TPModelPatcher:
    """The MODEL of the file that the node shows as `name`. What it warns of is shown on the node.

    Raises:
        CheckpointError, SizeError, DeviceError, GroupStartError: what `load_model` and
            `choose_group` refuse.
        ValueError: a choice that is not on the list.
    """
    check_choice("weight_dtype", weight_dtype, _DTYPES)
    check_choice("optimize", optimize, OPTIMIZE)
    check_choice("precision", precision, PRECISIONS)
    placement = Placement(gpu_count, devices, layout, where, precision)
    info = checkpoint_info(path)
    warnings = warnings_of_node(node_id)
    if info.extra:  # as the stock loader says "unet unexpected", in the log
        warnings(
            f"{name} has {len(info.extra)} tensors that {info.label} does not use, such "
            f"as {min(info.extra)}. They are left out."
        )
    dtype, fp8_products = _DTYPES[weight_dtype]
    fp8_products |= PerformanceFeature.Fp8MatrixMultiplication in args.fast
    group = choose_group(
        placement, info, warnings, management.throw_exception_if_processing_interrupted, dtype
    )
    model = load_model(path, dtype, group, placement, optimize, fp8_products)
    warn_of_streaming(model.remote, warnings)
    warn_of_rounding(model.remote, warnings)
    # Ready, or nearly so, when the text encoder has run.
    if group.where != "ray":
        prepare_start(group.python)
    return model


def _stop_if_cancelled() -> None:
    """Leaves the cancel to the prompt: ComfyUI goes on if a fingerprint raises it."""
    if management.processing_interrupted():
        raise GroupStartError("The prompt is cancelled.")
