"""ComfyUI's layers as they are where it has a GPU ("dynamic VRAM", since 0.33), on a CPU.

With ``TP_TEST_DYNAMIC_VRAM=1`` in the server's environment. Layers then have no weights until a
file is loaded into them; what needs comfy-aimdo's library and a GPU stays as it is on a CPU.
"""

import os

from safetensors.torch import load_file


def layers_without_weights() -> None:
    """From now on, if the environment asks for it."""
    if not os.environ.get("TP_TEST_DYNAMIC_VRAM"):
        return
    import comfy.memory_management
    import comfy_aimdo.model_vbar

    comfy.memory_management.aimdo_enabled = True
    comfy_aimdo.model_vbar.vbars_reset_watermark_limits = lambda: None
    comfy.utils.load_safetensors = lambda path: (load_file(path), {})
