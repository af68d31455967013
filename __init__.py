"""Tensor Parallel: a ComfyUI pack that runs diffusion transformers split over several GPUs.

ComfyUI imports this file from `custom_nodes` and calls `comfy_entrypoint`. Anywhere else (a plain
`pytest`, an editor) there is no ComfyUI to import, and the file defines nothing.
"""

from importlib.util import find_spec

WEB_DIRECTORY = "./web"

# No NODE_CLASS_MAPPINGS here, ever: where that name exists, ComfyUI ignores comfy_entrypoint.
if find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
