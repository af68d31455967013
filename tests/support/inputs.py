"""Random arguments of a model's forward, as ComfyUI's BaseModel passes them, at small sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tp_runtime.models.family import Input, Sizes, axis_length


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
    lengths: Mapping[str, int] | None = None,
    time_scale: float = 1.0,
    times_per_item: int = 0,
    masks: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **others: Any,
) -> dict[str, Any]:
    """What the family declares, at random.

    ``length``: tokens of the caption. ``references``: height and width of each (frames before
    them). ``residuals``: of a ControlNet, by ComfyUI's name of the blocks, the tokens for each.
    ``lengths``: of other axes; an optional input that has an axis of unknown length is left out, as
    is what ``without`` names. ``times_per_item``: of timesteps with a second axis. ``masks`` are in
    the dtype of the latents, and ``others`` passed on as they are.
    """
    generator = torch.Generator().manual_seed(1000 * batch + height + length)
    known = {"batch": batch, "frames": frames, "height": height, "width": width, "tokens": length}
    known |= lengths or {}

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def tensor(declared: Input, own: Mapping[str, int]) -> torch.Tensor:
        shape = [axis_length(axis, own) for axis in declared.axes]
        if not any(axis[0] == "pixel rows" for axis in declared.axes if isinstance(axis, tuple)):
            return random(*shape)
        # Pictures of large spots: of what is as fine as pixels, models see nothing.
        rows, columns = shape[-2] // 4, shape[-1] // 4
        return random(*shape[:-2], 4, 4).repeat_interleave(rows, -2).repeat_interleave(columns, -1)

    inputs: dict[str, Any] = {"transformer_options": {}}
    for name, declared in sizes.all_inputs.items():
        own = {**declared.usual, **known}
        axes = {axis for axis in declared.axes if isinstance(axis, str)}
        if declared.kind in ("mask", "any"):  # only if it is asked for
            continue
        if name == "timesteps":
            shape = (batch, times_per_item) if times_per_item else (batch,)
            inputs[name] = time_scale * torch.rand(shape, generator=generator)
        elif name == "guidance":
            # BaseModel rounds it to the model's dtype; times 1000, this one is exact in bf16, too.
            inputs[name] = torch.full((batch,), 4.0, dtype=dtype)
        elif declared.many:
            sizes_of = [dict(zip(("rows", "columns"), size, strict=True)) for size in references]
            if sizes_of:
                inputs[name] = [tensor(declared, own | of_one) for of_one in sizes_of]
        elif axes <= own.keys():
            found = [tensor(one, {**one.usual, **own}) for one in (declared, *declared.besides)]
            inputs[name] = found if declared.besides else found[0]
        else:
            assert declared.optional, name
    if mask:
        inputs["attention_mask"] = random(*mask)
    if residuals:
        stacks = {"middle": (), "input": (), "output": ()} | dict(residuals)
        inputs["control"] = {
            name: [None if n is None else random(batch, n, sizes.dim) for n in counts]
            for name, counts in stacks.items()
        }
    inputs |= {name: one.to(dtype) for name, one in (masks or {}).items()}
    return {name: value for name, value in inputs.items() if name not in without} | others
