"""Test-only nodes: deterministic inputs that need no text encoder, and broken ones."""

import torch
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
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int, length: int, width: int, batch: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(batch, length, width, generator=generator)
        return io.NodeOutput([[embedding, {}]])


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
