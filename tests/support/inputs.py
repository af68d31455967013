"""Random arguments of a model's forward, as ComfyUI's BaseModel passes them, at small sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tp_runtime.models.family import Input, Sizes


def make_inputs(
    sizes: Sizes,
    *,
    batch: int = 1,
    frames: int = 1,
    height: int = 16,
    width: int = 16,
    length: int = 20,
    references: Sequence[tuple[int, ...]] = (),
    mask: Sequence[int] = (),
    residuals: Mapping[str, Sequence[int | None]] | None = None,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> dict[str, Any]:
    """What the family declares, at random.

    ``length``: tokens of the caption. ``references``: height and width of each (frames before
    them). ``residuals``: of a ControlNet, by ComfyUI's name of the blocks, the tokens for each.
    ``without``: what is left out. ``others`` are passed on as they are.
    """
    generator = torch.Generator().manual_seed(1000 * batch + height + length)
    lengths = {"batch": batch, "frames": frames, "height": height, "width": width}
    lengths |= {"tokens": length}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def tensor(declared: Input, **own: int) -> torch.Tensor:
        named = {**declared.usual, **lengths, **own}
        return random(
            *(named[axis] if isinstance(axis, str) else axis[1] for axis in declared.axes)
        )

    inputs: dict[str, Any] = {"transformer_options": {}}
    for name, declared in sizes.all_inputs.items():
        if name == "timesteps":
            inputs[name] = torch.rand(batch, generator=generator)
        elif name == "guidance":
            # BaseModel rounds it to the model's dtype; times 1000, this one is exact in bf16, too.
            inputs[name] = torch.full((batch,), 4.0, dtype=dtype)
        elif not declared.many:
            inputs[name] = tensor(declared)
        elif references:
            axes = [dict(zip(("rows", "columns"), size[-2:], strict=True)) for size in references]
            inputs[name] = [tensor(declared, **own) for own in axes]
    if mask:
        inputs["attention_mask"] = random(*mask)
    if residuals:
        stacks = {"middle": (), "input": (), "output": ()} | dict(residuals)
        inputs["control"] = {
            name: [None if n is None else random(batch, n, sizes.dim) for n in counts]
            for name, counts in stacks.items()
        }
    return {name: value for name, value in inputs.items() if name not in without} | others
