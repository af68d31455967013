"""ComfyUI's side of the pack: the nodes, the weightless MODEL and its patcher.

Runs in ComfyUI's process. Sees ComfyUI's modules and the public names of `tp_runtime`, nothing of
vLLM or diffusers. The rank processes are started when a sampler first runs, not on import; what
they are forked from, with ComfyUI or when somebody is likely to run a loader (`early_start.py`).

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
    renamed.py, replacements.py               prompts with older names; nodes ours stand for
    early_start.py                            the imports of the GPU processes, begun in time
    page.py, settings.py                      what `web/` asks the server; the settings it stores
"""

from comfy_api.latest import ComfyExtension, io

from .checkpoint_loader import TPLoadCheckpoint
from .early_start import prepare_for, prepare_with_comfyui
from .loader import TPLoadDiffusionModel
from .notices import comfy_server
from .page import serve_page
from .renamed import with_new_names
from .replacements import register_replacements
from .runtime_nodes import TPReleaseRuntime, TPRuntimeInfo
from .sampler import TPSampler


class TensorParallelExtension(ComfyExtension):
    """What ComfyUI asks a pack for."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TPLoadDiffusionModel, TPLoadCheckpoint, TPSampler, TPRuntimeInfo, TPReleaseRuntime]


async def comfy_entrypoint() -> TensorParallelExtension:
    """Called once by ComfyUI when it loads the pack."""
    server = comfy_server()
    if server is not None:
        serve_page(server)
        prepare_with_comfyui()
        server.add_on_prompt_handler(prepare_for)
        server.add_on_prompt_handler(with_new_names)
        await register_replacements()
    return TensorParallelExtension()
