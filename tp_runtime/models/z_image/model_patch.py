"""The Fun Union ControlNets, as data; ``control.py`` has their arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...sharding.parts import Shape
from ...sharding.plan import Column, Replicated
from ...sharding.table import IMAGE, Linear, Stack, Table
from .. import family as of
from ..model_patch import ModelPatch
from .rows import EMBEDDER, modulated_block

CONTROL_REFINERS = 2  # there are as many of every published model


@dataclass(frozen=True)
class UnionControl(ModelPatch):
    """A second, shorter row of blocks beside the model's.

    ``num_layers``: of those. ``refined``: it also adds to the refined image, and looks at it.
    """

    label = "Fun Union ControlNet"
    comfyui_patch = "ZImageControlPatch"
    comfyui_model = "ZImage_Control"
    places = ("noise_refiner", "double_block")
    settings = ("broken",)
    whole = True
    num_heads: int
    head_dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    refined: bool

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Shape]) -> "UnionControl":
        first = "control_layers.0"
        head_dim = shapes[f"{first}.attention.q_norm.weight"][0]
        return cls(
            shapes[f"{first}.attention.out.weight"][0] // head_dim,
            head_dim,
            shapes[f"{first}.feed_forward.w1.weight"][0],
            of.blocks("control_layers")(shapes),
            shapes[f"control_all_x_embedder.{EMBEDDER}.weight"][1] // 4,
            "control_noise_refiner.0.after_proj.weight" in shapes,
        )

    @property
    def dim(self) -> int:
        """Width of its tokens."""
        return self.num_heads * self.head_dim

    @cached_property
    def table(self) -> Table:
        dim, noise, layers = self.dim, "control_noise_refiner", "control_layers"
        patch, gathered = 4 * self.in_channels, Column(gather=True)
        after = Linear("after_proj", "", gathered, dim, dim, IMAGE)
        before = [layers, noise] if self.refined else [layers]
        outside = (
            Linear(f"control_all_x_embedder.{EMBEDDER}", "", Replicated(), patch, dim, IMAGE),
            *(Linear(f"{stack}.0.before_proj", "", gathered, dim, dim, IMAGE) for stack in before),
        )
        block = modulated_block(self, IMAGE)
        of_noise = (*block, after) if self.refined else block
        stacks = Stack(noise, noise, CONTROL_REFINERS, of_noise)
        return Table(outside, (stacks, Stack(layers, layers, self.num_layers, (*block, after))))

    def check_fits(self, label: str, sizes: Any) -> None:
        own = self.num_heads, self.head_dim, CONTROL_REFINERS
        of_model = sizes.num_heads, sizes.head_dim, sizes.num_refiners
        if own != of_model:
            has = "{} heads of {} and {} refiners".format(*own)
            raise self.unfit(has, label, "{} of {} and {}".format(*of_model))
