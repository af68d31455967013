"""Who uses a group: the models and model patches on it that somebody holds."""

import threading
import weakref
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .residency import Holdable


class Users:
    """The models and model patches of a group that there are, without keeping them. Thread-safe."""

    def __init__(self) -> None:
        self._models: weakref.WeakSet[Holdable] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, model: "Holdable", on_gone: Callable[[], None]) -> None:
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

    def named(self, names: Collection[str]) -> "list[Holdable]":
        """Of these names, in that order, those that somebody holds."""
        with self._lock:
            found = {model.name: model for model in self._models}
        return [found[name] for name in names if name in found]
