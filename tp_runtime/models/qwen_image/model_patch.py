"""The block-wise ControlNet of DiffSynth, as data; ``control.py`` has its arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...sharding.parts import Shape
from ...sharding.table import IMAGE, Stack, Table, Tensor
from .. import family as of
from ..model_patch import ModelPatch
from ..rows import mlp


@dataclass(frozen=True)
class BlockWiseControl(ModelPatch):
    """Two linears for each block of the model."""

    label = "DiffSynth ControlNet"
    comfyui_patch = "DiffSynthCnetPatch"
    comfyui_model = "QwenImageBlockWiseControlNet"
    places = ("double_block",)
    dim: int
    num_blocks: int

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Shape]) -> "BlockWiseControl":
        dim = shapes["controlnet_blocks.0.input_proj.weight"][0]
        return cls(dim, of.blocks("controlnet_blocks")(shapes))

    @cached_property
    def table(self) -> Table:
        dim, stack = self.dim, "controlnet_blocks"
        block = (
            *mlp("{in,out}put_proj", "", (dim, dim, dim), IMAGE),
            Tensor("{x,y}_rms.weight", "", (dim,)),
        )
        return Table((), (Stack(stack, stack, self.num_blocks, block),))

    def check_fits(self, label: str, sizes: Any) -> None:
        if self.dim != sizes.dim or self.num_blocks < sizes.num_blocks:
            own = f"{self.num_blocks} blocks of width {self.dim}"
            raise self.unfit(own, label, f"{sizes.num_blocks} of width {sizes.dim}")
