"""The node "TP Sampler": KSampler with a GPU count."""

import dataclasses
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.latest import io

from .gpu_count import CHOICES, choose_group
from .model import on_group
from .notices import warn_of_rounding, warn_of_streaming, warnings_of_node
from .patcher import TPModelPatcher
from .schema import check_choice, tp_schema
from .unsupported import UnsupportedFeatureError

_FROM_MODEL = "from model"


class TPSampler(io.ComfyNode):
    """ComfyUI's KSampler, whose model runs on as many GPUs as `gpu_count` says."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        # Inputs, their order, defaults and ranges are KSampler's, so that one replaces the other.
        return tp_schema(
            node_id="TPSampler",
            display_name="TP Sampler",
            description=(
                "Denoises a latent with a model that is split over several GPUs. Like KSampler, "
                "plus a GPU count. Takes a model from 'Load Diffusion Model (TP)' or 'Load "
                "Checkpoint (TP)'."
            ),
            search_aliases=["tensor parallel", "multi gpu", "ksampler", "parallel", "vllm"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model, from a loader whose name ends in (TP)."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The random seed used for creating the noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="The number of steps used in the denoising process.",
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip=(
                        "How closely the picture follows the prompt (classifier-free guidance). "
                        "1 skips the negative prompt and halves the work; distilled models such "
                        "as Z-Image Turbo want 1."
                    ),
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="The algorithm used when sampling.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="How noise is gradually removed to form the image.",
                ),
                io.Conditioning.Input("positive", tooltip="What you want to include in the image."),
                io.Conditioning.Input(
                    "negative", tooltip="What you want to exclude from the image."
                ),
                io.Latent.Input("latent_image", tooltip="The latent image to denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "The amount of denoising applied; lower values keep the structure of the "
                        "initial image (image to image)."
                    ),
                ),
                io.Combo.Input(
                    "gpu_count",
                    options=[_FROM_MODEL, *CHOICES],
                    default=_FROM_MODEL,
                    tooltip=(
                        "Over how many GPUs the model is split: as its loader says, as many as "
                        "possible if more are not slower ('auto'), or a number."
                    ),
                ),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        denoise: float,
        gpu_count: str,
    ) -> io.NodeOutput:
        import nodes  # ComfyUI's own module of that name

        check_choice("sampler_name", sampler_name, comfy.samplers.KSampler.SAMPLERS)
        check_choice("scheduler", scheduler, comfy.samplers.KSampler.SCHEDULERS)
        if not isinstance(model, TPModelPatcher):
            raise UnsupportedFeatureError(
                "TP Sampler got a model from another loader. Load it with 'Load Diffusion Model "
                "(TP)' or 'Load Checkpoint (TP)', or sample it with KSampler."
            )
        model = cls._on_group(model, gpu_count)
        samples = nodes.common_ksampler(
            model,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
        )
        return io.NodeOutput(*samples)

    @classmethod
    def _on_group(cls, model: TPModelPatcher, gpu_count: str) -> TPModelPatcher:
        if gpu_count == _FROM_MODEL:
            return model
        warn = warnings_of_node(cls.hidden.unique_id)
        group = choose_group(
            dataclasses.replace(model.model.tp_placement, gpu_count=gpu_count),
            model.remote.info,
            warn,
            comfy.model_management.throw_exception_if_processing_interrupted,
            getattr(torch, model.remote.spec.weight_dtype),
        )
        model = on_group(model, group)
        warn_of_streaming(model.remote, warn)
        warn_of_rounding(model.remote, warn)
        return model
