"""Random forward arguments, as ComfyUI's BaseModel passes them: what the family declares."""

from typing import Any

import torch

from tp_runtime.models import family_named
from tp_runtime.models.family import AtLeast, Input, Sizes


def make_inputs(model: str, sizes: Sizes, side: int, batch: int) -> dict[str, Any]:
    """Inputs for pictures of ``side`` × ``side`` pixels, in bf16 with fp32 timesteps.

    Where ComfyUI has them: on the first GPU, if there is one. Without reference pictures.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    latent = dict(
        zip(("height", "width"), sizes.geometry.latent_shape(side, side)[-2:], strict=True)
    )
    lengths = latent | {"batch": batch, "frames": 1, "tokens": family_named(model).text_tokens}
    generator = torch.Generator().manual_seed(0)

    def tensor(declared: Input) -> torch.Tensor:
        named = lengths | dict(declared.usual)
        shape = [
            named[axis]
            if isinstance(axis, str)
            else axis.length
            if isinstance(axis, AtLeast)
            else axis[1]
            for axis in declared.axes
        ]
        if len(shape) == 1:  # a number for each picture
            return torch.rand(shape, generator=generator)
        return torch.randn(shape, generator=generator)

    declared = {name: one for name, one in sizes.all_inputs.items() if not one.many and one.axes}
    inputs = {name: tensor(one) for name, one in declared.items()}
    dtypes = {"timesteps": torch.float32}
    return {
        name: value.to(device, dtypes.get(name, torch.bfloat16)) for name, value in inputs.items()
    } | {"transformer_options": {}}
