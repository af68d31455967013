"""Who uses a group: the models on it that somebody holds."""

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .remote_model import RemoteModel


class Users:
    """The ``RemoteModel`` objects of a group that there are, without keeping them. Thread-safe."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[RemoteModel] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, model: "RemoteModel", on_gone: Callable[[], None]) -> None:
        """``on_gone`` is called when ``model`` is gone, by the garbage collector: in any thread."""
        with self._lock:
            self._models.add(model)
        weakref.finalize(model, on_gone).atexit = False

    def __bool__(self) -> bool:
        """Whether there is one."""
        with self._lock:
            return bool(self._models)

    def names(self) -> set[str]:
        """The names of the models; equal specs have one name."""
        with self._lock:
            return {model.name for model in self._models}
