"""ComfyUI's side of the toy: its files in the lists of the stock loaders, and its text encoder."""

import json
from pathlib import Path
from typing import Any, ClassVar

import folder_paths
from comfy import supported_models
from comfy_api.latest import ComfyExtension, io
from safetensors import safe_open

MODELS = Path(__file__).parent / "models"
WORDS_FILE = MODELS / "text_encoders" / "shapes_words.safetensors"


class ShapesZImage(supported_models.ZImage):
    """Z-Image with the toy's sizes. ComfyUI knows the sizes of the published one by its width."""

    unet_config: ClassVar[dict[str, Any]] = {"image_model": "lumina2", "dim": 256}
    unet_extra_config: ClassVar[dict[str, Any]] = {
        "n_heads": 8,
        "n_kv_heads": 8,
        "axes_dims": [8, 12, 12],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 1.0,
        "n_refiner_layers": 1,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
    }


def add_models() -> None:
    """Let the stock loaders list the toy's files and recognise its model."""
    for folder in ("diffusion_models", "vae"):
        folder_paths.add_model_folder_path(folder, str(MODELS / folder))
    supported_models.models.insert(0, ShapesZImage)


class ShapesPrompt(io.ComfyNode):
    """The toy's text encoder: one fixed vector a word."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ShapesPrompt",
            display_name="Shapes Prompt",
            category="tensor parallel/examples",
            description='Words for the toy model, such as "small red circle at the top on blue".',
            inputs=[
                io.String.Input(
                    "text",
                    default="red circle on blue",
                    tooltip="A shape and its background; size and place if wanted. May be empty.",
                )
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        with safe_open(WORDS_FILE, framework="pt") as file:
            vocabulary = json.loads(file.metadata()["vocabulary"])
            vectors = file.get_tensor("words")
        words = text.lower().split() or [""]
        unknown = [word for word in words if word not in vocabulary]
        if unknown:
            raise ValueError(
                f"The toy model does not know {', '.join(map(repr, unknown))}. "
                f"Its words are: {', '.join(filter(None, vocabulary))}."
            )
        tokens = [vocabulary.index(word) for word in words]
        return io.NodeOutput([[vectors[tokens].unsqueeze(0), {}]])


class ShapesExtension(ComfyExtension):
    """What ComfyUI asks a pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ShapesPrompt]
