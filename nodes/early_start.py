"""Starts what the GPU processes are forked from before a sampler needs it.

It imports for some seconds, and holds 500 MB of the machine's memory and nothing of a GPU. So it
is started when somebody is likely to need it soon, and ends after minutes in which nobody does.
"""

import contextlib
import logging
import sys
import threading
from importlib.util import find_spec
from typing import Any

from ..tp_runtime.client import (
    GroupStartError,
    prepare_start,
    runtime_python,
    visible_gpu_count,
)
from .settings import prepare_setting, python_setting

logger = logging.getLogger("tensor_parallel")

LOADERS = ("TPLoadDiffusionModel", "TPLoadCheckpoint")


def prepare(*, keep: bool = False) -> None:
    """Have it import in the background. A setting that is wrong is for the start of a group to say.

    `keep`: it ends with ComfyUI only.
    """
    with contextlib.suppress(GroupStartError):
        if not lacks_runtime():
            prepare_start(runtime_python(python_setting()), keep=keep)


def prepare_with_comfyui() -> None:
    """ComfyUI starts: prepare if the settings say so, or if there are several GPUs."""
    try:
        when = prepare_setting()
    except GroupStartError as error:  # ComfyUI starts all the same
        logger.warning("%s", error)
        return
    if when == "always":
        prepare(keep=True)
    elif when == "auto" and visible_gpu_count() > 1:
        prepare()


def prepare_for(request: dict[str, Any]) -> dict[str, Any]:
    """What was posted to /prompt, as it is. If it has a loader of ours, prepare.

    So the imports need not wait until the nodes before the loader have run.
    """
    prompt = request.get("prompt")
    if any(map(_runs_here, prompt.values() if isinstance(prompt, dict) else ())):
        # Not in ComfyUI's event loop: a process is started.
        threading.Thread(target=prepare, name="tp-prepare", daemon=True).start()
    return request


def lacks_runtime() -> bool:
    """Whether the ranks are to run in ComfyUI's Python, which has no vLLM.

    Raises:
        GroupStartError: see `python_setting`.
    """
    return runtime_python(python_setting()) == sys.executable and find_spec("vllm") is None


def _runs_here(node: Any) -> bool:
    """Whether a node of a prompt is a loader of ours whose model runs on this machine."""
    if not isinstance(node, dict) or node.get("class_type") not in LOADERS:
        return False
    inputs = node.get("inputs")
    return isinstance(inputs, dict) and inputs.get("where") != "ray"
