"""Random forward arguments of full size, as ComfyUI's BaseModel passes them."""

from typing import Any

import torch

TEXT_TOKENS = {"z_image": 64, "flux": 512, "qwen_image": 64}


def make_inputs(model: str, side: int, batch: int) -> dict[str, Any]:
    """Inputs for pictures of ``side`` × ``side`` pixels, in bf16 with fp32 timesteps.

    Where ComfyUI has them: on the first GPU, if there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = _on_cpu(model, side, batch)
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def _on_cpu(model: str, side: int, batch: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    if model not in TEXT_TOKENS:
        raise ValueError(f"no inputs for the model {model!r}")
    latent, length = side // 8, TEXT_TOKENS[model]
    inputs: dict[str, Any] = {
        "timesteps": torch.full((batch,), 0.7),
        "transformer_options": {},
    }
    if model == "z_image":
        inputs |= {"x": normal(batch, 16, latent, latent), "context": normal(batch, length, 2560)}
        return inputs
    if model == "flux":
        return inputs | {
            "x": normal(batch, 16, latent, latent),
            "context": normal(batch, length, 4096),
            "y": normal(batch, 768),
            "guidance": torch.full((batch,), 3.5).bfloat16(),
        }
    return inputs | {
        "x": normal(batch, 16, 1, latent, latent),
        "context": normal(batch, length, 3584),
    }
