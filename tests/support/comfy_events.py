"""Collects what ComfyUI says over its websocket: progress, executing nodes, previews.

Used by `comfy_server.ComfyServer`; runs in a thread of the test process.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

# ComfyUI's protocol.py: BinaryEventTypes
_PREVIEW_IMAGE = 1
_TEXT = 3


@dataclass(frozen=True)
class Event:
    """One message; `time_s` is this process's monotonic clock.

    `kind` is ComfyUI's own name (`progress`, `executing`, `executed`, ...), or `preview` for a
    binary image (then `data` is empty and `image` holds the encoded picture), or `text` for a
    message on a node (`data` has `node` and `text`).
    """

    kind: str
    data: dict[str, Any]
    time_s: float
    image: bytes = field(default=b"", repr=False)


class EventListener:
    """One websocket connection; prompts queued with its `client_id` report to it."""

    def __init__(self, url: str) -> None:
        self.client_id = uuid.uuid4().hex
        self._events: list[Event] = []
        self._arrived = threading.Condition()
        self._connection = ExitStack()
        self._socket = self._connection.enter_context(
            connect(
                f"{url}?clientId={self.client_id}", max_size=None, proxy=None, ping_interval=None
            )
        )
        self._thread = threading.Thread(target=self._receive, name="comfy-events", daemon=True)
        self._thread.start()

    def _receive(self) -> None:
        try:
            for message in self._socket:
                event = _decode(message)
                with self._arrived:
                    self._events.append(event)
                    self._arrived.notify_all()
        except ConnectionClosed:
            return  # the server was killed

    def all(self, kind: str | None = None) -> list[Event]:
        """Events so far, oldest first; only those of `kind` when it is given."""
        with self._arrived:
            return [event for event in self._events if kind in (None, event.kind)]

    def clear(self) -> None:
        """Forget the events so far."""
        with self._arrived:
            self._events.clear()

    def wait_for(
        self, kind: str, where: Callable[[Event], bool] = lambda _: True, timeout_s: float = 60
    ) -> Event:
        """The first event of `kind` for which `where` holds, waiting for it if need be.

        Raises:
            TimeoutError: none came within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while True:
                for event in self._events:
                    if event.kind == kind and where(event):
                        return event
                if not self._arrived.wait(timeout=deadline - time.monotonic()):
                    kinds = [event.kind for event in self._events]
                    raise TimeoutError(f"no {kind!r} event in {timeout_s} s; came: {kinds}")

    def close(self) -> None:
        """Close the connection and end the thread."""
        self._connection.close()
        self._thread.join(timeout=10)


def _decode(message: str | bytes) -> Event:
    now_s = time.monotonic()
    if isinstance(message, str):
        document = json.loads(message)
        return Event(document["type"], document.get("data") or {}, now_s)
    kind = int.from_bytes(message[:4], "big")
    if kind == _TEXT:
        end = 8 + int.from_bytes(message[4:8], "big")
        data = {"node": message[8:end].decode(), "text": message[end:].decode()}
        return Event("text", data, now_s)
    if kind != _PREVIEW_IMAGE:
        return Event(f"binary-{kind}", {}, now_s)
    return Event("preview", {}, now_s, image=message[8:])
