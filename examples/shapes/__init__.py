"""The toy: a Z-Image that draws coloured shapes, with all that it takes to use it in ComfyUI.

As a folder of `custom_nodes`, this adds the node "Shapes Prompt" and the files in `models`. For
training and for checking pictures it is a package without ComfyUI.
"""

from typing import Any


async def comfy_entrypoint() -> Any:
    """Called once by ComfyUI when it loads the pack."""
    from .nodes import ShapesExtension, add_models

    add_models()
    return ShapesExtension()
