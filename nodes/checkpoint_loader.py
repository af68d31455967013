"""The node "Load Checkpoint (TP)"."""

from typing import Any

import comfy.sd
import folder_paths
from comfy.model_detection import unet_prefix_from_state_dict
from comfy_api.latest import io

from ..tp_runtime.client import CheckpointInfo, checkpoint_info
from .loading import choices, fingerprint, load
from .schema import tp_schema

_FOLDER = "checkpoints"


class TPLoadCheckpoint(io.ComfyNode):
    """ComfyUI's Load Checkpoint, whose MODEL is split over several GPUs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return tp_schema(
            node_id="TPLoadCheckpoint",
            display_name="Load Checkpoint (TP)",
            description=(
                "Loads a checkpoint whose diffusion model is split over several GPUs (tensor "
                "parallelism). CLIP and VAE are those that ComfyUI's Load Checkpoint gives."
            ),
            search_aliases=[
                "tensor parallel",
                "multi gpu",
                "checkpoint",
                "load checkpoint",
                "load model",
                "ckpt",
                "vllm",
                "tp",
            ],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folder_paths.get_filename_list(_FOLDER),
                    tooltip="A file in ComfyUI's checkpoints folder.",
                ),
                *choices(),
            ],
            # In the order of ComfyUI's Load Checkpoint, so that one replaces the other.
            outputs=[
                io.Model.Output(tooltip="The model. Any sampler, guider or scheduler can use it."),
                io.Clip.Output(tooltip="The text encoder in the file, in ComfyUI's process."),
                io.Vae.Output(tooltip="The VAE in the file, in ComfyUI's process."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str | None, **chosen: Any) -> str:
        if ckpt_name is None:  # another node gives it
            return "linked"
        return fingerprint(checkpoint_path(ckpt_name), **chosen)

    @classmethod
    def execute(cls, ckpt_name: str, **chosen: Any) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(_FOLDER, ckpt_name)
        model = load(cls.hidden.unique_id, ckpt_name, path, **chosen)
        return io.NodeOutput(model, *clip_and_vae(checkpoint_info(path)))


def checkpoint_path(name: str) -> str | None:
    """Where the checkpoint of that name is, in ComfyUI's folders; None: nowhere."""
    return folder_paths.get_full_path(_FOLDER, name)


def clip_and_vae(info: CheckpointInfo) -> tuple[Any, Any]:
    """What ComfyUI's Load Checkpoint gives of a file beside its MODEL.

    By ComfyUI's own code (`comfy.sd.load_checkpoint_guess_config`), which maps the file and reads
    what it uses: without its model, the text encoder and the VAE alone. Of a file that has neither,
    None and a VAE that says so where it is used, as there.
    """
    names = dict.fromkeys(info.prefix + name for name in info.tensors)
    if unet_prefix_from_state_dict(names) != info.prefix:
        # No checkpoint for ComfyUI, which would load it as a diffusion model, here and whole.
        return None, comfy.sd.VAE(sd={})
    _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        info.path,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        output_model=False,
    )
    return clip, vae
