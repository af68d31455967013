"""ComfyUI's attention for CPUs adds a mask of truth values to the scores, as ones and zeros.

torch's, which ComfyUI uses on GPUs, takes it as what it is. Classes that give such masks get that
one in the tests, so that the reference is what people see.
"""

import contextlib
from importlib import import_module

_WITH_TRUTH_VALUES = ("comfy.ldm.qwen_image21.model",)


def mend_attention() -> None:
    """Those classes that the running ComfyUI has."""
    from comfy.ldm.modules.attention import attention_pytorch

    for name in _WITH_TRUTH_VALUES:
        with contextlib.suppress(ModuleNotFoundError):
            import_module(name).optimized_attention = attention_pytorch  # type: ignore[attr-defined]
