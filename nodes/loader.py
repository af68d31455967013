"""The node "Load Diffusion Model (TP)"."""

from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy_api.latest import io

from ..tp_runtime.client import (
    OPTIMIZE,
    WHERE,
    GroupStartError,
    TPRuntimeError,
    checkpoint_info,
    file_version,
    prepare_start,
)
from .gpu_count import CHOICES, choose_group
from .layouts import LAYOUTS
from .model import load_model
from .notices import warnings_of_node
from .placement import AUTO, HERE, Placement
from .schema import advanced, check_choice, tp_schema

_FOLDER = "diffusion_models"
_GGUF_FOLDER = "unet_gguf"
_DIFFUSERS_FILES = "diffusion_pytorch_model"
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


class TPLoadDiffusionModel(io.ComfyNode):
    """Gives a MODEL whose weights are split over several GPUs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return tp_schema(
            node_id="TPLoadDiffusionModel",
            display_name="Load Diffusion Model (TP)",
            description=(
                "Loads a diffusion model split over several GPUs (tensor parallelism), so that it "
                "runs faster and each GPU holds only a part of it. The model works with TP Sampler "
                "and with all of ComfyUI's own samplers."
            ),
            search_aliases=[
                "tensor parallel",
                "multi gpu",
                "unet",
                "unet loader",
                "load diffusion model",
                "vllm",
                "tp",
            ],
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=_model_names(),
                    tooltip=(
                        "A model file in ComfyUI's diffusion_models folder, or a diffusers folder "
                        "there (with config.json). GGUF files need the Python package 'gguf'."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(_DTYPES),
                    default="default",
                    tooltip=(
                        "What the weights are held in on the GPUs. 'default' chooses as the stock "
                        "loader does: usually what the file has, if the GPU can compute in it. "
                        "'fp8_e4m3fn_fast' also multiplies in fp8, if the GPU can and "
                        "TP_RUNTIME_QUANTISED_PRODUCTS is on. Quantised weights (int8, scaled fp8, "
                        "…) stay as they are in any case."
                    ),
                ),
                io.Combo.Input(
                    "gpu_count",
                    options=list(CHOICES),
                    default=AUTO,
                    tooltip=(
                        "Over how many GPUs the model is split. 'auto' takes as many of this "
                        "machine's GPUs as the model can be split over. Without a GPU, the model "
                        "runs in as many CPU processes ('auto': 1)."
                    ),
                ),
                advanced(
                    io.String.Input(
                        "devices",
                        default="",
                        optional=True,
                        tooltip=(
                            "Which GPUs the model may be on, by number, such as 0,2,3. The first "
                            "ones of the list are taken, as many as gpu_count says. Empty: all."
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
                            "How the GPUs share the work. 'tp': each holds a part of the model. "
                            "'2x2' (TP size x batch groups): two groups of two GPUs, each with "
                            "the whole model, which divide batches (also the two halves of CFG). "
                            "'auto' takes what is the fastest, by the steps measured so far."
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
            ],
            outputs=[
                io.Model.Output(tooltip="The model. Any sampler, guider or scheduler can use it.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        unet_name: str | None,
        gpu_count: str | None,
        devices: str | None = "",
        layout: str | None = AUTO,
        where: str | None = HERE,
        **_: Any,
    ) -> str:
        """Another value when the file has been replaced by another of the same name.

        And when 'auto' has come to mean another group. An input that another node gives is None.
        """
        if unet_name is None:
            return "linked"
        path = model_path(unet_name)
        if path is None:
            return "missing"
        version = file_version(path)
        if gpu_count is None or devices is None or layout is None or where is None:
            return f"{path} {version}"
        placement = Placement(gpu_count, devices, layout, where)
        try:
            info = checkpoint_info(path)
            group = choose_group(placement, info, lambda _: None, _stop_if_cancelled)
        except (TPRuntimeError, ValueError):  # whatever runs with it raises it
            return f"{path} {version}"
        return f"{path} {version} {group}"

    @classmethod
    def execute(
        cls,
        unet_name: str,
        weight_dtype: str,
        gpu_count: str,
        devices: str = "",
        optimize: str = "auto",
        layout: str = AUTO,
        where: str = HERE,
    ) -> io.NodeOutput:
        check_choice("weight_dtype", weight_dtype, _DTYPES)
        check_choice("optimize", optimize, OPTIMIZE)
        path = model_path(unet_name)
        if path is None:
            path = folder_paths.get_full_path_or_raise(_FOLDER, unet_name)
        placement = Placement(gpu_count, devices, layout, where)
        info = checkpoint_info(path)
        warnings = warnings_of_node(cls.hidden.unique_id)
        if info.extra:  # as the stock loader says "unet unexpected", in the log
            warnings(
                f"{unet_name} has {len(info.extra)} tensors that {info.label} does not use, such "
                f"as {min(info.extra)}. They are left out."
            )
        group = choose_group(
            placement, info, warnings, management.throw_exception_if_processing_interrupted
        )
        dtype, fp8_products = _DTYPES[weight_dtype]
        model = load_model(path, dtype, group, placement, optimize, fp8_products)
        # Ready, or nearly so, when the text encoder has run.
        if group.where != "ray":
            prepare_start(group.python)
        return io.NodeOutput(model)


def _stop_if_cancelled() -> None:
    """Leaves the cancel to the prompt: ComfyUI goes on if a fingerprint raises it."""
    if management.processing_interrupted():
        raise GroupStartError("The prompt is cancelled.")


def _model_names() -> list[str]:
    """ComfyUI's list of model files, with a diffusers folder in the place of its files.

    And GGUF files, if the package that reads them is there.
    """
    names = []
    for name in folder_paths.get_filename_list(_FOLDER):
        file = PurePath(name)
        folder = str(file.parent)
        if file.name.startswith(_DIFFUSERS_FILES) and _config_of(folder) is not None:
            name = folder
        names.append(name)
    if find_spec("gguf") is not None:
        names += folder_paths.get_filename_list(_gguf_folder())
    return list(dict.fromkeys(names))


def _gguf_folder() -> str:
    """ComfyUI's name for the GGUF files in the folders of diffusion models.

    ComfyUI itself lists no such files. ComfyUI-GGUF has a list of this name; ours is the same.
    """
    folders = folder_paths.folder_names_and_paths
    folders.setdefault(_GGUF_FOLDER, (folders[_FOLDER][0], {".gguf"}))
    return _GGUF_FOLDER


def model_path(name: str) -> str | None:
    """Where the model file or folder of that name is, in ComfyUI's folders; None: nowhere."""
    config = _config_of(name)
    if config is not None:
        return str(Path(config).parent)
    path = folder_paths.get_full_path(_FOLDER, name)
    return path or folder_paths.get_full_path(_gguf_folder(), name)


def _config_of(folder: str) -> str | None:
    # ComfyUI finds files, not folders.
    return folder_paths.get_full_path(_FOLDER, str(PurePath(folder) / "config.json"))
