"""Messages to the person at the page that are no errors: in the log and on the node."""

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..tp_runtime.client import RemoteModel

logger = logging.getLogger("tensor_parallel")

NODE_EVENT = "tensor_parallel.node"
WARNING_EVENT = "tensor_parallel.warning"
# Of an evaluation with 8 bits between the GPUs: `docs/scaling.md` has the measurements.
ROUNDING_ERROR = "up to about 1 %"


def warnings_of_node(node_id: str | None) -> Callable[[str], None]:
    """A function that logs a warning and shows it on the node, where a page is connected.

    What an earlier run showed there is taken back.
    """
    _show_warning(node_id, "")
    said: list[str] = []

    def warn(text: str) -> None:
        logger.warning("%s", text)
        said.append(text)
        _show_warning(node_id, " ".join(said))

    return warn


def warn_of_streaming(remote: RemoteModel, warn: Callable[[str], None]) -> None:
    """Warn that the model's GPUs cannot hold all of its weights, if that is so."""
    streamed = remote.planned_streaming()
    if streamed:
        held = remote.planned_bytes()
        warn(
            f"{remote.info.label} does not fit on its GPUs: of each one's part of the weights, "
            f"{gibibytes(held + streamed)}, about {gibibytes(streamed)} stay in the host's "
            "memory and are read at every step, which is slower. More GPUs or a quantised file "
            "may hold all of it."
        )


def warn_of_rounding(remote: RemoteModel, warn: Callable[[str], None]) -> None:
    """Warn that what the model's GPUs send to one another may be rounded, and by how much."""
    if remote.spec.precision == "fast" and remote.group_config.num_ranks > 1:
        warn(
            "precision is 'fast': unless NVLink connects the GPUs, they send one another 8 bits a "
            f"number. A result then differs from that of 'exact' by {ROUNDING_ERROR} "
            "(docs/scaling.md)."
        )


def gibibytes(size: int) -> str:
    """Bytes as the page shows them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _show_warning(node_id: str | None, text: str) -> None:
    server = comfy_server()
    if server is not None:
        _tell(server, WARNING_EVENT, node_id, {"text": text})


def show_on_node(node_id: str | None, text: str) -> None:
    """Show a text on the node, where a page is connected."""
    server = comfy_server()
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)


def show_group_on_node(remote: RemoteModel) -> None:
    """Have the page mark the node that runs now with the group that its model runs on."""
    server = comfy_server()
    if server is not None:
        running = {"group": remote.group_id, "model": remote.name}
        _tell(server, NODE_EVENT, server.last_node_id, running)


def _tell(server: Any, event: str, node_id: str | None, said: Mapping[str, str]) -> None:
    """Send an event about a node of the prompt that runs, where a page is connected."""
    if None not in (server.client_id, node_id):
        prompt = getattr(server, "last_prompt_id", None)  # there is none before the first
        server.send_sync(event, {"node": node_id, "prompt": prompt, **said}, server.client_id)


def comfy_server() -> Any:
    """ComfyUI's server; None where there is none, as when nodes are only listed."""
    module = sys.modules.get("server")  # importing it would need all of ComfyUI's requirements
    return getattr(getattr(module, "PromptServer", None), "instance", None)
