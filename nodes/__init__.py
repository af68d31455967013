"""ComfyUI's side of the pack: the nodes, the weightless MODEL and its patcher.

Runs in ComfyUI's process. Sees ComfyUI's modules and the public names of `tp_runtime`, nothing of
vLLM or diffusers. The rank processes are started when a sampler first runs, not on import; what
they are forked from when a loader does, or with ComfyUI if the settings say so.

    loader.py, checkpoint_loader.py           the nodes that load; what both share:
      loading.py                                inputs, and what they mean
    sampler.py, runtime_nodes.py              the other nodes
    placement.py, gpu_count.py, layouts.py    what a person asks about GPUs, and what it means here
    model.py                                  makes MODELs, out of:
      skeleton.py, absent.py                    ComfyUI's own model of a file, without its weights
      proxy.py, arguments.py                    the module whose forward runs on the ranks
      patcher.py                                what ComfyUI loads, frees, clones and patches
    unsupported.py, origins.py                the refusals; whose code is refused
    conditions.py, together.py                a sampler's step: timed, its evaluations made at once
    weights.py, block_patches.py              what LoRA nodes and others change, to plain data
    schema.py, notices.py                     node declarations, messages on a node
    renamed.py                                prompts with older names
    page.py, settings.py                      what `web/` asks the server; the settings it stores
"""

import logging

from comfy_api.latest import ComfyExtension, io

from ..tp_runtime.client import GroupStartError, prepare_start, runtime_python
from .checkpoint_loader import TPLoadCheckpoint
from .loader import TPLoadDiffusionModel
from .notices import comfy_server
from .page import serve_page
from .renamed import with_new_names
from .runtime_nodes import TPReleaseRuntime, TPRuntimeInfo
from .sampler import TPSampler
from .settings import keep_ready_setting, python_setting

logger = logging.getLogger("tensor_parallel")


class TensorParallelExtension(ComfyExtension):
    """What ComfyUI asks a pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TPLoadDiffusionModel, TPLoadCheckpoint, TPSampler, TPRuntimeInfo, TPReleaseRuntime]


async def comfy_entrypoint() -> TensorParallelExtension:
    """Called once by ComfyUI when it loads the pack."""
    server = comfy_server()
    if server is not None:
        serve_page(server)
        _be_ready_early()
        server.add_on_prompt_handler(with_new_names)
    return TensorParallelExtension()


def _be_ready_early() -> None:
    """Begin with the imports of the GPU processes, if a person wants that."""
    try:
        if keep_ready_setting():
            prepare_start(runtime_python(python_setting()), keep=True)
    except GroupStartError as error:  # a setting is wrong: ComfyUI starts all the same
        logger.warning("%s", error)
