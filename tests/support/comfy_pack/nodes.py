"""Test-only nodes: inputs that need no text encoder and no files, and broken ones."""

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.samplers
import folder_paths
import torch
from comfy.cli_args import LatentPreviewMethod, args
from comfy.clip_vision import Output
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from safetensors.torch import save_file

# `io.MODEL_PATCH` has another name in newer releases; the socket's type is the same.
_MODEL_PATCH = io.Custom("MODEL_PATCH")


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


class TPTestKeepLatent(io.ComfyNode):
    """SaveLatent for latents of every kind: those of video and sound are two tensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestKeepLatent",
            category="testing",
            description="Writes the tensors of a latent into a file of the output folder.",
            inputs=[io.Latent.Input("samples"), io.String.Input("name")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], name: str) -> io.NodeOutput:
        latent = samples["samples"]
        parts = latent.unbind() if getattr(latent, "is_nested", False) else [latent]
        tensors = {str(index): part.contiguous() for index, part in enumerate(parts)}
        save_file(tensors, Path(folder_paths.get_output_directory()) / f"{name}.safetensors")
        return io.NodeOutput()


class TPTestKnown(io.ComfyNode):
    """Which evaluations are said to have the same constant inputs (`Asked.known_as`)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestKnown",
            category="testing",
            description="Has a number written for every evaluation, or that nothing is known.",
            inputs=[io.Model.Input("model"), io.String.Input("name")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, name: str) -> io.NodeOutput:
        remote = model.model.diffusion_model.remote
        evaluate_all = type(remote).evaluate_all.__get__(remote)
        numbers: dict[Any, int | str] = {None: "unknown"}
        file = Path(folder_paths.get_output_directory()) / f"{name}.txt"

        def noted(inputs: list[Any], *args: Any, known_as: list[Any]) -> list[Any]:
            with file.open("a") as lines:
                for known in known_as:
                    print(numbers.setdefault(known, len(numbers)), file=lines)
            return evaluate_all(inputs, *args, known_as=known_as)

        remote.evaluate_all = noted
        return io.NodeOutput(model)


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


class TPTestSeen(io.ComfyNode):
    """What a CLIP vision model says of a picture, without the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestSeen",
            category="testing",
            description="Random features that depend on the inputs only.",
            inputs=[
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1),
                io.Int.Input("patches", default=257, min=1, max=4096),
                io.Int.Input("width", default=1280, min=1, max=8192),
            ],
            outputs=[io.ClipVisionOutput.Output()],
        )

    @classmethod
    def execute(cls, seed: int, patches: int, width: int) -> io.NodeOutput:
        seen = Output()
        generator = torch.Generator().manual_seed(seed)
        seen.penultimate_hidden_states = torch.randn(1, patches, width, generator=generator)
        return io.NodeOutput(seen)


class TPTestVideoVAE(io.ComfyNode):
    """What stands for Wan 2.2's VAE of 48 channels, which ComfyUI builds in its full size only."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestVideoVAE",
            category="testing",
            description="Its latents are random, and the same for every picture of a size.",
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(_VideoVAE())


class _VideoVAE:
    """Encodes one picture to one latent frame of a sixteenth of its sides."""

    latent_channels = 48

    def spacial_compression_encode(self) -> int:
        return 16

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        _, height, width, _ = pixels.shape
        generator = torch.Generator().manual_seed(height + width)
        return torch.randn(1, 48, 1, height // 16, width // 16, generator=generator)


class TPTestModelPatches(io.ComfyNode):
    """Patches that ModelPatchLoader reads, for models of width 384, and 480 (Z-Image)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestModelPatches",
            category="testing",
            description="ComfyUI's own classes; its loader has the sizes of the real models fixed.",
            inputs=[
                io.Int.Input("seed", default=0, optional=True),
                io.Int.Input("masked", default=0, tooltip="1: for inpainting", optional=True),
                io.Int.Input("union_layers", default=0, tooltip="of Z-Image's", optional=True),
            ],
            outputs=[
                _MODEL_PATCH.Output("control"),
                _MODEL_PATCH.Output("style"),
                io.ClipVisionOutput.Output("seen"),
            ],
        )

    @classmethod
    def execute(cls, seed: int = 0, masked: int = 0, union_layers: int = 0) -> io.NodeOutput:
        from comfy_extras.nodes_model_patch import (
            QwenImageBlockWiseControlNet,
            SigLIPMultiFeatProjModel,
        )

        control: torch.nn.Module
        if union_layers:
            control = _union_control(union_layers, masked)
        else:
            control = QwenImageBlockWiseControlNet(3, 64, 4 * masked, 384, operations=torch.nn)
        style = SigLIPMultiFeatProjModel(4, 4, 8, hidden_size=384, operations=torch.nn)
        seen = Output()
        seen.all_hidden_states = torch.ones(1, 24, 4, 8)
        seen.penultimate_hidden_states = torch.ones(1, 4, 8)
        return io.NodeOutput(_patcher(control, seed), _patcher(style, seed), seen)


def _union_control(num_layers: int, masked: int) -> torch.nn.Module:
    """Of newer releases, for the tiny Z-Image of 30 layers (`support.z_image_controls`)."""
    from comfy.ldm.lumina.controlnet import ZImage_Control

    found: torch.nn.Module = ZImage_Control(
        dim=288,
        n_heads=6,
        n_kv_heads=6,
        n_control_layers=num_layers,
        additional_in_dim=17 * masked,
        refiner_control=bool(masked),
        operations=comfy.ops.disable_weight_init,
    )
    return found


def _patcher(module: torch.nn.Module, seed: int) -> ModelPatcher:
    torch.manual_seed(seed)
    for name, weight in module.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if _is_norm(name) else 0.0, std=0.05)
    device = torch.device("cpu")
    return ModelPatcher(module, load_device=device, offload_device=device)


def _is_norm(name: str) -> bool:
    return any(word in name for word in ("_rms.", "norm."))


class TwoModels(comfy.samplers.CFGGuider):
    """The positive conditioning goes to one model, the negative to another, with one's options."""

    def __init__(self, model: ModelPatcher, negative_model: ModelPatcher) -> None:
        super().__init__(model)
        self._negative = negative_model

    def outer_sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        comfy.model_management.load_models_gpu([self._negative])
        self._negative.pre_run()
        try:
            return super().outer_sample(*args, **kwargs)
        finally:
            self._negative.cleanup()

    def predict_noise(
        self, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, _seed: Any = None
    ) -> torch.Tensor:
        halves = [
            comfy.samplers.calc_cond_batch(model, [self.conds[name]], x, timestep, model_options)[0]
            for name, model in (("positive", self.inner_model), ("negative", self._negative.model))
        ]
        return comfy.samplers.cfg_function(
            self.inner_model, *halves, self.cfg, x, timestep, model_options=model_options
        )


class TPTestTwoModels(io.ComfyNode):
    """A guider over two models, as newer releases of ComfyUI have one (DualModelGuider)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TPTestTwoModels",
            category="testing",
            description="Evaluates the negative conditioning on another model.",
            inputs=[
                io.Model.Input("model"),
                io.Model.Input("negative_model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Float.Input("cfg", default=2.0),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(
        cls, model: Any, negative_model: Any, positive: Any, negative: Any, cfg: float
    ) -> io.NodeOutput:
        guider = TwoModels(model, negative_model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)
