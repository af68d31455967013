"""The Fun Union ControlNets of Z-Image: ComfyUI's ``ZImage_Control`` (0.33,
comfy/ldm/lumina/controlnet.py), and when ``ZImageControlPatch`` calls it
(comfy_extras/nodes_model_patch.py).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import InputError
from ..pictures import pack_patches
from ..token_shares import TokenShares
from .family import PATCH
from .model_patch import CONTROL_REFINERS, UnionControl
from .rows import EMBEDDER

if TYPE_CHECKING:
    from .forward import After, Forward

NUM_LAYERS = 30  # of the model, among which ComfyUI spreads the control layers


def build(sizes: UnionControl) -> nn.Module:
    """The module of that size, with diffusers' blocks."""
    from diffusers.models.transformers import transformer_z_image as of_diffusers

    def blocks(count: int, adds: bool) -> nn.ModuleList:
        found = nn.ModuleList()
        for index in range(count):
            heads = sizes.num_heads, sizes.num_heads
            block = of_diffusers.ZImageTransformerBlock(index, sizes.dim, *heads, 1e-5, True)
            block.feed_forward = of_diffusers.FeedForward(sizes.dim, sizes.ffn_dim)
            if adds and not index:
                block.before_proj = nn.Linear(sizes.dim, sizes.dim)
            if adds:
                block.after_proj = nn.Linear(sizes.dim, sizes.dim)
            found.append(block)
        return found

    embedder = nn.Linear(PATCH * PATCH * sizes.in_channels, sizes.dim)
    module = nn.Module()
    module.control_all_x_embedder = nn.ModuleDict({EMBEDDER: embedder})
    module.control_noise_refiner = blocks(CONTROL_REFINERS, sizes.refined)
    module.control_layers = blocks(sizes.num_layers, True)
    return module


def check_hint(label: str, module: Any, hint: torch.Tensor, x: torch.Tensor) -> None:
    """Raises InputError for a picture's latent that does not fit the ControlNet and ``x``."""
    channels = module.control_all_x_embedder[EMBEDDER].weight.shape[1] // PATCH**2
    size = tuple(side + -side % PATCH for side in x.shape[-2:])
    shape, batch = tuple(hint.shape), x.shape[0]
    if shape[1:] != (channels, *size) or shape[0] not in (1, batch):
        raise InputError(
            f"The picture of the ControlNet has a latent of shape {shape}; {label} takes ({batch}, "
            f"{channels}, {size[0]}, {size[1]}) here, or one for all items of the batch. Use as "
            "many pictures as latents, or one, and the VAE of the model."
        )


class Controls:
    """The ControlNets of one evaluation, which add to the image's tokens after some blocks."""

    def __init__(
        self,
        forward: "Forward",
        patches: Sequence[Mapping[str, Any]],
        image: torch.Tensor,
        of_image: TokenShares,
        rotation: torch.Tensor,
        adaln: torch.Tensor,
    ) -> None:
        """``image``: this rank's tokens of it (B, l, D), by ``of_image``; ``rotation``: of all."""
        given = image, of_image, rotation, adaln
        self._each = [_Control(forward, patch, *given) for patch in patches]

    def after_refiners(self, image: torch.Tensor) -> "After":
        """What they do to the image's tokens after each; ``image``: those before all refiners."""
        if not self._each:
            return {}
        before = image.clone()

        def add(number: int, tokens: torch.Tensor) -> None:
            for control in self._each:
                control.after_refiner(number, tokens, before)

        return {number: partial(add, number) for number in range(CONTROL_REFINERS)}

    def after_layers(self, image: torch.Tensor, of_both: TokenShares, num_layers: int) -> "After":
        """The same of the layers, whose tokens are those of text and image (``of_both``)."""
        if not self._each:
            return {}
        before = image.clone()

        def add(number: int, tokens: torch.Tensor) -> None:
            for control in self._each:
                control.after_layer(number, of_both.of_stream(tokens, 1), before)

        places = {place for control in self._each for place in control.places(num_layers)}
        return {place: partial(add, place) for place in places}


class _Control:
    """One of them, with tokens of its own, which go through its own blocks."""

    def __init__(
        self,
        forward: "Forward",
        patch: Mapping[str, Any],
        image: torch.Tensor,
        of_image: TokenShares,
        rotation: torch.Tensor,
        adaln: torch.Tensor,
    ) -> None:
        self._forward, self._module = forward, forward.model_patches[patch["name"]]
        self._strength, self._broken = patch["strength"], patch["broken"]
        refiner, layers = self._module.control_noise_refiner, self._module.control_layers
        hint = pack_patches(patch["hint"], channels_last=True)
        tokens = self._module.control_all_x_embedder[EMBEDDER](hint)
        # Tokens that only pad the image have none here.
        self._shares = of_image.of_first(tokens.shape[1])
        own = self._shares.own(tokens)
        self._tokens = own.expand(image.shape[0], -1, -1).contiguous()
        self._rotation = self._shares.own(rotation[:, : tokens.shape[1]])
        modulation = forward.modulation([*refiner, *layers], adaln)
        self._refiner = list(zip(refiner, modulation.split(1), strict=False))
        self._layers = list(zip(layers, modulation[len(refiner) :].split(1), strict=True))
        self._apart = round(NUM_LAYERS / len(layers))
        if not hasattr(refiner[0], "after_proj"):
            for each in self._refiner:
                self._run(*each)

    def places(self, num_layers: int) -> list[int]:
        """The layers of the model after which it adds to the image."""
        return list(range(0, num_layers, self._apart))[: len(self._layers)]

    def after_refiner(self, index: int, image: torch.Tensor, before: torch.Tensor) -> None:
        """Add to the image's tokens in place; ``before``: those before all refiners."""
        if self._broken:
            # Files whose refiners were never trained: ComfyUI goes through the layers.
            steps = self._layers[1:] if index else self._layers[:1]
        elif hasattr(self._refiner[index][0], "after_proj"):
            steps = [self._refiner[index]]
        else:
            return
        update, *_ = [self._step(*each, before) for each in steps]
        self._add(image, update)

    def after_layer(self, index: int, image: torch.Tensor, before: torch.Tensor) -> None:
        """The same; ``before``: those before all layers."""
        layer, rest = divmod(index, self._apart)
        if not rest and layer < len(self._layers):
            self._add(image, self._step(*self._layers[layer], before))

    def _add(self, image: torch.Tensor, update: torch.Tensor) -> None:
        image[:, : update.shape[1]] += update * self._strength

    def _step(self, block: Any, modulation: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Go on through a block; what is to be added."""
        if hasattr(block, "before_proj"):
            here = before[:, : self._tokens.shape[1]]
            self._tokens = block.before_proj(self._tokens) + here
        self._run(block, modulation)
        update: torch.Tensor = block.after_proj(self._tokens)
        return update

    def _run(self, block: Any, modulation: torch.Tensor) -> None:
        found = self._forward.run_blocks(
            [block], self._tokens, self._rotation, self._shares, modulation
        )
        self._tokens = found.clone()  # out of memory that the next sum overwrites
