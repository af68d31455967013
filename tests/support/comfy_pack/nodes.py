"""Test-only nodes: inputs that need no text encoder and no files, and broken ones."""

from typing import Any

import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.clip_vision import Output
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io


class TPTestConditioning(io.ComfyNode):
    """A caption that needs no text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestConditioning",
            category="testing",
            description="Random text embedding that depends on the inputs only.",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1),
                io.Int.Input("length", default=32, min=1, max=4096, tooltip="tokens"),
                io.Int.Input("width", default=64, min=1, max=8192, tooltip="values per token"),
                io.Int.Input("batch", default=1, min=1, max=64),
                io.Int.Input(
                    "pooled_width",
                    default=0,
                    min=0,
                    max=8192,
                    optional=True,
                    tooltip="values of the pooled text embedding; 0: there is none",
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(
        cls, seed: int, length: int, width: int, batch: int, pooled_width: int = 0
    ) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(batch, length, width, generator=generator)
        more: dict[str, Any] = {"pooled_output": None}  # as encoders without one have it
        if pooled_width:
            more["pooled_output"] = torch.randn(batch, pooled_width, generator=generator)
        return io.NodeOutput([[embedding, more]])


class TPTestNaNLatent(io.ComfyNode):
    """A latent that no sampler can use."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestNaNLatent",
            category="testing",
            description="The same latent with one value replaced by NaN.",
            inputs=[io.Latent.Input("samples")],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, torch.Tensor]) -> io.NodeOutput:
        broken = samples["samples"].clone()
        broken.view(-1)[0] = float("nan")
        return io.NodeOutput({**samples, "samples": broken})


class TPTestPreviewMethod(io.ComfyNode):
    """ComfyUI's `--preview-method`, from now on (ComfyUI-Manager changes it in the same way)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestPreviewMethod",
            category="testing",
            description="Sets how latents are shown while they are sampled.",
            inputs=[
                io.Latent.Input("samples"),
                io.Combo.Input("method", options=[method.value for method in LatentPreviewMethod]),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")

    @classmethod
    def execute(cls, samples: dict[str, torch.Tensor], method: str) -> io.NodeOutput:
        args.preview_method = LatentPreviewMethod(method)
        return io.NodeOutput(samples)


class TPTestModelPatches(io.ComfyNode):
    """The two kinds of patches that ModelPatchLoader reads, for models of width 384."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestModelPatches",
            category="testing",
            description="ComfyUI's own classes; its loader has the sizes of the real models fixed.",
            outputs=[
                io.MODEL_PATCH.Output("control"),
                io.MODEL_PATCH.Output("style"),
                io.ClipVisionOutput.Output("seen"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from comfy_extras.nodes_model_patch import (
            QwenImageBlockWiseControlNet,
            SigLIPMultiFeatProjModel,
        )

        control = QwenImageBlockWiseControlNet(num_layers=3, dim=384, operations=torch.nn)
        style = SigLIPMultiFeatProjModel(4, 4, 8, hidden_size=384, operations=torch.nn)
        seen = Output()
        seen.all_hidden_states = torch.ones(1, 24, 4, 8)
        seen.penultimate_hidden_states = torch.ones(1, 4, 8)
        return io.NodeOutput(_patcher(control), _patcher(style), seen)


def _patcher(module: torch.nn.Module) -> ModelPatcher:
    torch.manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    device = torch.device("cpu")
    return ModelPatcher(module, load_device=device, offload_device=device)
