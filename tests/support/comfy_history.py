"""How a prompt ended: what ComfyUI's history says of it, or the error.

Used by `comfy_server.ComfyServer`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class PromptError(Exception):
    """ComfyUI refused a prompt, or a node raised.

    `type` is the exception's class, or "interrupted" after `/interrupt`. For a refused prompt it
    is the type that ComfyUI's validation gives, and `node_id` the first node it complains about
    (None when it names none).
    """

    def __init__(self, node_id: str | None, error_type: str, message: str) -> None:
        super().__init__(f"node {node_id}: {error_type}: {message}")
        self.node_id = node_id
        self.type = error_type
        self.message = message


@dataclass(frozen=True)
class History:
    """What ComfyUI recorded of one finished prompt."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    messages: list[tuple[str, dict[str, Any]]]

    @property
    def duration_s(self) -> float:
        """From the start of the execution to its end, by ComfyUI's own time stamps."""
        stamps = [body["timestamp"] for _, body in self.messages if "timestamp" in body]
        return float(max(stamps) - min(stamps)) / 1000

    @property
    def cached(self) -> set[str]:
        """The nodes that did not run, since ComfyUI had their results from before."""
        return {
            node_id
            for kind, body in self.messages
            if kind == "execution_cached"
            for node_id in body["nodes"]
        }

    def text(self, node_id: str) -> str:
        """The text that a node showed in the page."""
        return "\n".join(self.outputs[node_id]["text"])


def finished(prompt_id: str, entry: Mapping[str, Any]) -> History:
    """The history of a prompt that ended.

    Raises:
        PromptError: a node raised, or the prompt was interrupted.
    """
    messages = [(kind, body) for kind, body in entry["status"]["messages"]]
    for kind, body in messages:
        if kind == "execution_error":
            message = body["exception_message"].strip()
            raise PromptError(body["node_id"], body["exception_type"], message)
        if kind == "execution_interrupted":
            raise PromptError(body["node_id"], "interrupted", "the prompt was interrupted")
    return History(prompt_id, entry["outputs"], messages)


def validation_error(reply: Mapping[str, Any]) -> PromptError:
    """The error of ComfyUI's reply to a prompt that it refused."""
    for node_id, node in (reply.get("node_errors") or {}).items():
        error = node["errors"][0]
        return PromptError(node_id, error["type"], f"{error['message']}: {error['details']}")
    error = reply["error"]
    return PromptError(None, error["type"], f"{error['message']}: {error['details']}")
