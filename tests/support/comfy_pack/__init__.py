"""A ComfyUI node pack for the tests: it is linked into the test server's custom_nodes.

It lets ComfyUI's stock loader read the tiny checkpoints. Only the stock loader: the correction is
open during `comfy.sd.load_diffusion_model` and nowhere else, so that our own loader is tested
against the ComfyUI that users have.
"""

from functools import wraps
from typing import Any

import comfy.sd
from comfy_api.latest import ComfyExtension, io

from .detection import tiny_models_detected
from .nodes import TPTestConditioning, TPTestNaNLatent


def _extend_stock_loader() -> None:
    stock_load = comfy.sd.load_diffusion_model

    @wraps(stock_load)
    def load_diffusion_model(*args: Any, **kwargs: Any) -> Any:
        with tiny_models_detected():
            return stock_load(*args, **kwargs)

    comfy.sd.load_diffusion_model = load_diffusion_model


class TestExtension(ComfyExtension):
    """The nodes of `nodes.py`."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TPTestConditioning, TPTestNaNLatent]


async def comfy_entrypoint() -> TestExtension:
    """Called once by ComfyUI when it loads the pack."""
    _extend_stock_loader()
    return TestExtension()
