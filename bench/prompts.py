"""ComfyUI's prompts: a node for each name."""

from typing import Any

Prompt = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt; an input ``[node, 0]`` is a link."""
    return {"class_type": class_type, "inputs": inputs}
