"""API-format prompts for the tests: what ComfyUI's page sends when a person presses Queue.

A prompt is a dict of node id → node. The ids here are words, so that an error that names a node is
readable, and a test changes a prompt by indexing it: `prompt["sampler"]["inputs"]["steps"] = 2`.
"""

import copy
from dataclasses import dataclass
from typing import Any, Literal

Prompt = dict[str, dict[str, Any]]
GpuCount = int | str


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node; an input that is `[node id, output index]` is a link."""
    return {"class_type": class_type, "inputs": inputs}


def stock_loader(model_file: str) -> dict[str, Any]:
    """ComfyUI's Load Diffusion Model."""
    return node("UNETLoader", unet_name=model_file, weight_dtype="default")


def tp_loader(
    model_file: str, gpu_count: GpuCount = "auto", weight_dtype: str = "default"
) -> dict[str, Any]:
    """Load Diffusion Model (TP): by tensor parallelism, whatever the steps before took."""
    return node(
        "TPLoadDiffusionModel",
        unet_name=model_file,
        weight_dtype=weight_dtype,
        gpu_count=str(gpu_count),
        layout="tp",
    )


def on_gpus_of(where: str, prompt: Prompt) -> Prompt:
    """The prompt, with its loaders' `where`."""
    loaders = {name for name, of in prompt.items() if of["class_type"] == "TPLoadDiffusionModel"}
    return {
        name: {**of, "inputs": of["inputs"] | {"where": where}} if name in loaders else of
        for name, of in prompt.items()
    }


@dataclass(frozen=True)
class Sampling:
    """What is sampled and how; every sampler node below reads these."""

    seed: int = 7
    steps: int = 4
    cfg: float = 1.0
    sampler_name: str = "euler"
    scheduler: str = "simple"
    denoise: float = 1.0
    width: int = 128
    height: int = 128
    batch_size: int = 1
    caption_length: int = 24
    caption_width: int = 64
    pooled_width: int = 0


def text_to_latent(
    loader: dict[str, Any],
    sampler: Literal["KSampler", "TPSampler", "SamplerCustomAdvanced"] = "KSampler",
    sampling: Sampling | None = None,
    *,
    gpu_count: GpuCount = "from model",
) -> Prompt:
    """Caption and empty latent → `sampler` → SaveLatent.

    Nodes: `model`, `positive`, `negative`, `latent`, `sampler`, `save`, and with
    SamplerCustomAdvanced also `noise`, `guider`, `schedule`, `method`. `gpu_count` is TPSampler's.
    """
    s = sampling or Sampling()
    prompt = {
        "model": loader,
        "positive": _caption(1, s),
        "negative": _caption(2, s),
        "latent": node(
            "EmptySD3LatentImage", width=s.width, height=s.height, batch_size=s.batch_size
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test"),
    }
    if sampler == "SamplerCustomAdvanced":
        return prompt | _custom_sampler(s)
    prompt["sampler"] = node(
        sampler,
        model=["model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        latent_image=["latent", 0],
        seed=s.seed,
        steps=s.steps,
        cfg=s.cfg,
        sampler_name=s.sampler_name,
        scheduler=s.scheduler,
        denoise=s.denoise,
    )
    if sampler == "TPSampler":
        prompt["sampler"]["inputs"]["gpu_count"] = str(gpu_count)
    return prompt


def tp_text_to_latent(
    model_file: str, gpu_count: GpuCount = 2, sampling: Sampling | None = None
) -> Prompt:
    """The same through Load Diffusion Model (TP) and TP Sampler, with a report of the groups.

    The node `report` runs after the sampler; `support.group_reports` reads it.
    """
    prompt = text_to_latent(tp_loader(model_file, gpu_count), "TPSampler", sampling)
    return with_report(prompt)


def with_report(prompt: Prompt, after: str = "sampler") -> Prompt:
    """The same prompt with TP Runtime Info (`report`), which runs after the node `after`."""
    return prompt | {"report": node("TPRuntimeInfo", anything=[after, 0])}


def stock_twin(prompt: Prompt) -> Prompt:
    """The same prompt on ComfyUI's native model: stock loader, KSampler, no report."""
    twin = copy.deepcopy(prompt)
    for node_id, item in prompt.items():
        inputs = twin[node_id]["inputs"]
        match item["class_type"]:
            case "TPLoadDiffusionModel":
                twin[node_id] = stock_loader(inputs["unet_name"])
            case "TPSampler":
                twin[node_id]["class_type"] = "KSampler"
                del inputs["gpu_count"]
            case "TPRuntimeInfo":
                del twin[node_id]
    return twin


def with_picture(prompt: Prompt, vae_name: str) -> Prompt:
    """The same prompt, with the latent also decoded by the stock nodes and saved (`picture`)."""
    return prompt | {
        "vae": node("VAELoader", vae_name=vae_name),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=["vae", 0]),
        "picture": node("SaveImage", images=["decoded", 0], filename_prefix="picture"),
    }


def _caption(seed: int, s: Sampling) -> dict[str, Any]:
    return node(
        "TPTestConditioning",
        seed=seed,
        length=s.caption_length,
        width=s.caption_width,
        batch=1,
        pooled_width=s.pooled_width,
    )


def _custom_sampler(s: Sampling) -> Prompt:
    return {
        "noise": node("RandomNoise", noise_seed=s.seed),
        "guider": node(
            "CFGGuider",
            model=["model", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            cfg=s.cfg,
        ),
        "method": node("KSamplerSelect", sampler_name=s.sampler_name),
        "schedule": node(
            "BasicScheduler",
            model=["model", 0],
            scheduler=s.scheduler,
            steps=s.steps,
            denoise=s.denoise,
        ),
        "sampler": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["method", 0],
            sigmas=["schedule", 0],
            latent_image=["latent", 0],
        ),
    }
