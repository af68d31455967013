"""Tokens before the text, which a small model makes of a picture: USO's style references.

ComfyUI's node puts an object into the model, which is called with the embedded text and puts its
tokens before it. They are the same in every evaluation: ComfyUI's own code makes them in this
process, where the small model is loaded beside the MODEL, and the ranks put them before their text.
"""

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ..tp_runtime.client import RemoteModel
from .origins import module_of_nodes, origin

_MODULE = "comfy_extras.nodes_model_patch"
_PLACE = "post_input"


class StyleTokens:
    """Those that were made for one model, for as long as the objects that made them live."""

    def __init__(self, remote: RemoteModel) -> None:
        self._kinds = remote.info.family.style_patches
        self._lock = threading.Lock()  # evaluations of one step are prepared in threads
        self._made: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()

    def taken(
        self, options: Mapping[Any, Any], x: torch.Tensor
    ) -> tuple[Mapping[Any, Any], list[torch.Tensor]]:
        """`transformer_options` without the objects that make them; and each one's, in their order.

        `x`: the latent of this evaluation. Tokens are (pictures, tokens, width) in its dtype.
        """
        patches = options.get("patches") if self._kinds else None
        functions = patches.get(_PLACE) if isinstance(patches, Mapping) else None
        if not isinstance(functions, list | tuple) or not any(map(self._is_ours, functions)):
            return options, []
        left = [one for one in functions if not self._is_ours(one)]
        found = [self._tokens(one, x) for one in functions if self._is_ours(one)]
        return {**options, "patches": {**patches, _PLACE: left}}, found

    def _is_ours(self, function: Any) -> bool:
        module, name = origin(function)
        if name not in self._kinds or module_of_nodes(module) != _MODULE:
            return False
        return type(function.model_patch.model).__name__ == self._kinds[name]

    def _tokens(self, patch: Any, x: torch.Tensor) -> torch.Tensor:
        with self._lock:
            made = self._made.get(patch)
            if made is None or made.dtype != x.dtype:
                nothing = x.new_empty(0)  # which can be put after tokens of any shape
                made = self._made[patch] = patch({"txt": nothing, "txt_ids": nothing})["txt"]
            return made
