"""A ComfyUI node pack for the tests: it is linked into the test server's custom_nodes.

It lets ComfyUI's stock loaders read the tiny checkpoints and ControlNets. Only the stock loaders:
the correction is open during `comfy.sd.load_diffusion_model`, `load_checkpoint_guess_config` and
`comfy.controlnet.load_controlnet` and nowhere else, so that our own loader is tested against the
ComfyUI that users have.
"""

from functools import wraps
from types import ModuleType
from typing import Any

import comfy.controlnet
import comfy.sd
from comfy_api.latest import ComfyExtension, io

from .clip_vision import extend_clip_vision_loader
from .detection import tiny_models_detected
from .dynamic_vram import layers_without_weights
from .nodes import (
    TPTestConditioning,
    TPTestKeepLatent,
    TPTestKnown,
    TPTestModelPatches,
    TPTestNaNLatent,
    TPTestPreviewMethod,
    TPTestSeen,
    TPTestTwoModels,
    TPTestVideoVAE,
)
from .text_encoder import extend_checkpoint_loader, extend_clip_loader, tiny_clip_detected
from .vae import extend_vae


def _extend_stock_loader(module: ModuleType, name: str) -> None:
    stock_load = getattr(module, name)

    @wraps(stock_load)
    def load(*args: Any, **kwargs: Any) -> Any:
        with tiny_models_detected(), tiny_clip_detected():
            return stock_load(*args, **kwargs)

    setattr(module, name, load)


class TestExtension(ComfyExtension):
    """The nodes of `nodes.py`."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TPTestConditioning,
            TPTestKeepLatent,
            TPTestKnown,
            TPTestModelPatches,
            TPTestNaNLatent,
            TPTestPreviewMethod,
            TPTestTwoModels,
            TPTestSeen,
            TPTestVideoVAE,
        ]


async def comfy_entrypoint() -> TestExtension:
    """Called once by ComfyUI when it loads the pack."""
    layers_without_weights()
    _extend_stock_loader(comfy.sd, "load_diffusion_model")
    _extend_stock_loader(comfy.sd, "load_checkpoint_guess_config")
    _extend_stock_loader(comfy.controlnet, "load_controlnet")
    extend_clip_loader()
    extend_checkpoint_loader()
    extend_clip_vision_loader()
    extend_vae()
    return TestExtension()
