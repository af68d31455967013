"""The node "Load Diffusion Model (TP)"."""

from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import folder_paths
from comfy_api.latest import io

from .loading import choices, fingerprint, load
from .schema import tp_schema

_FOLDER = "diffusion_models"
_GGUF_FOLDER = "unet_gguf"
_DIFFUSERS_FILES = "diffusion_pytorch_model"


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
                *choices(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model. Any sampler, guider or scheduler can use it.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, unet_name: str | None, **chosen: Any) -> str:
        if unet_name is None:  # another node gives it
            return "linked"
        return fingerprint(model_path(unet_name), **chosen)

    @classmethod
    def execute(cls, unet_name: str, **chosen: Any) -> io.NodeOutput:
        path = model_path(unet_name)
        if path is None:
            path = folder_paths.get_full_path_or_raise(_FOLDER, unet_name)
        return io.NodeOutput(load(cls.hidden.unique_id, unet_name, path, **chosen))


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
