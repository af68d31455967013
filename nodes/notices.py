"""Messages to the person at the page that are no errors: in the log and on the node."""

import logging

logger = logging.getLogger("tensor_parallel")


def warn_on_node(node_id: str | None, text: str) -> None:
    """Log a warning and show it on the node, where a page is connected."""
    logger.warning("%s", text)
    from server import PromptServer  # starts nothing, but exists only inside a ComfyUI server

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id)
