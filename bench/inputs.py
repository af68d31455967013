"""Random forward arguments, as ComfyUI's BaseModel passes them: what the family declares."""

from typing import Any

import torch
from torch.utils import _pytree as pytree

from bench.extents import Extent
from tp_runtime.models import family_named
from tp_runtime.models.family import Input, Sizes, axis_length

_TIMESTEPS = "timesteps", "a_timestep"


def make_inputs(
    model: str, sizes: Sizes, extent: Extent, batch: int, references: int = 0
) -> dict[str, Any]:
    """Inputs for pictures or videos of that extent, in bf16 with fp32 timesteps.

    Where ComfyUI has them: on the first GPU, if there is one. With so many ``references``, of the
    size of the picture, and without what the model computes without, if its size is not known.
    Raises ValueError if the model takes no references.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = _lengths(model, sizes, extent, batch)
    generator = torch.Generator().manual_seed(0)

    def is_made(declared: Input) -> bool:
        axes = {axis for axis in declared.axes if isinstance(axis, str)}
        if declared.many or declared.kind in ("mask", "any"):
            return False
        return not (declared.optional and axes - (lengths | dict(declared.usual)).keys())

    def tensor(declared: Input) -> torch.Tensor:
        shape = _shape(declared, lengths)
        if len(shape) == 1:  # a number for each picture; times 1000 it is exact in bf16, too
            return torch.full(shape, 0.5)
        return torch.randn(shape, generator=generator)

    declared = {name: one for name, one in sizes.all_inputs.items() if is_made(one)}
    dtypes = {"timesteps": torch.float32}
    inputs: dict[str, Any] = {"transformer_options": {}}
    for name, one in declared.items():
        dtype = dtypes.get(name, torch.bfloat16)
        found = [tensor(each).to(device, dtype) for each in (one, *one.besides)]
        inputs[name] = found if one.besides else found[0]
    if references:
        if "ref_latents" not in sizes.all_inputs:
            raise ValueError(f"{model} takes no references")
        shape = sizes.geometry.latent_shape(extent.width, extent.height, extent.frames)
        one_picture = shape[:1] + ((1,) if sizes.geometry.video else ()) + shape[-2:]
        inputs["ref_latents"] = [
            torch.randn(batch, *one_picture, generator=generator).to(device, torch.bfloat16)
            for _ in range(references)
        ]
    return inputs


def of_step(inputs: dict[str, Any], step: int) -> dict[str, Any]:
    """The same at another step of a sampling: with a latent and timesteps of its own.

    Timesteps are half of the step's before, and exact in bf16 as well.
    """
    generator = torch.Generator().manual_seed(step)

    def latent(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    times = {name: inputs[name] * 0.5**step for name in _TIMESTEPS if name in inputs}
    return inputs | {"x": pytree.tree_map(latent, inputs["x"])} | times


def latent_shapes(model: str, sizes: Sizes, extent: Extent, batch: int) -> list[tuple[int, ...]]:
    """Of what is sampled: pictures or videos, and what the model makes besides, such as sound."""
    declared, lengths = sizes.all_inputs["x"], _lengths(model, sizes, extent, batch)
    return [_shape(one, lengths) for one in (declared, *declared.besides)]


def _lengths(model: str, sizes: Sizes, extent: Extent, batch: int) -> dict[str, int]:
    """Of the axes that the model does not fix."""
    shape = sizes.geometry.latent_shape(extent.width, extent.height, extent.frames)
    latent = dict(zip(("width", "height", "frames"), shape[:0:-1], strict=False))
    return {"batch": batch, "tokens": family_named(model).text_tokens} | latent


def _shape(declared: Input, lengths: dict[str, int]) -> tuple[int, ...]:
    known = lengths | dict(declared.usual)
    return tuple(axis_length(axis, known) for axis in declared.axes)
