"""The environment of processes that run ranks."""

import os

from ...config import PACKAGE, home, log_level

# What vLLM, NCCL and torch must know before they are imported. NVLink multicast and vLLM's two uses
# of it stay off: it is a shared resource of the whole NVSwitch fabric.
RANK_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # ComfyUI's folder has modules named utils, server, tests, ...
}


# ComfyUI sets its own choice (cuda_malloc.py, 0.3.75). In the memory of `cudaMallocAsync`, no
# evaluation can be recorded that other GPUs take part in.
_OF_COMFYUI = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def compile_caches() -> dict[str, str]:
    """Where what ranks compile is kept for the next start.

    torch's own choice is in the temporary folder, where its import leaves an empty folder, too.
    """
    return {variable: str(home() / "compiled" / name) for variable, name in COMPILE_CACHES.items()}


def code_that_runs(module: str) -> str:
    """What a Python runs with ``-c`` to run a module of this package.

    The package's folder is not on its PYTHONPATH: in that, a colon in a path separates two.
    """
    return (
        f"import runpy, sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); "
        f'runpy.run_module({module!r}, run_name="__main__", alter_sys=True)'
    )


def inherited_environment() -> dict[str, str]:
    """This process's environment, made fit for one that runs this package."""
    return {
        **RANK_ENVIRONMENT,
        **{name: value for name, value in os.environ.items() if name not in _OF_COMFYUI},
        "VLLM_LOGGING_LEVEL": log_level(),
    }
