"""Prompts of before the loader named its file `unet_name`, as ComfyUI's own loader does."""

from typing import Any

_LOADER, _OLD, _NEW = "TPLoadDiffusionModel", "model_name", "unet_name"


def with_new_names(request: dict[str, Any]) -> dict[str, Any]:
    """What was posted to /prompt, with the inputs of our nodes under today's names (in place)."""
    prompt = request.get("prompt")
    for node in prompt.values() if isinstance(prompt, dict) else ():
        inputs = node.get("inputs") if isinstance(node, dict) else None
        if isinstance(inputs, dict) and node.get("class_type") == _LOADER and _OLD in inputs:
            inputs.setdefault(_NEW, inputs.pop(_OLD))
    return request
