"""Model patches: ControlNets that ComfyUI calls in a model's blocks, and the ranks compute.

A node puts an object of ComfyUI's into the model, which holds a small model and a picture. The
ranks get the small model's weights once, and what ComfyUI's own code makes of the picture with each
evaluation. The object itself is never called with an evaluation's tokens.
"""

import copy
import weakref
from collections.abc import Mapping
from pathlib import PurePath
from types import SimpleNamespace
from typing import Any

import torch

from ..tp_runtime.client import RemoteModel, RemotePatch
from .origins import origin

_MODULE = ("comfy_extras", "nodes_model_patch")  # whose name ComfyUI makes of its path


class ModelPatches:
    """The model patches that were ever used with one model."""

    def __init__(self, remote: RemoteModel) -> None:
        self._remote = remote
        self._kinds = {one.comfyui_patch: one for one in remote.info.family.model_patches}
        # By the small models, which nodes may share between several objects.
        self._on_ranks: weakref.WeakKeyDictionary[torch.nn.Module, RemotePatch] = (
            weakref.WeakKeyDictionary()
        )

    def taken(
        self, options: Mapping[Any, Any], x: torch.Tensor
    ) -> tuple[Mapping[Any, Any], list[dict[str, Any]]]:
        """`transformer_options` without those that the ranks compute; and these, as an input.

        `x`: the latent of this evaluation.

        Raises:
            InputError: the small model does not fit the model.
        """
        patches = options.get("patches")
        if not self._kinds or not isinstance(patches, Mapping):
            return options, []
        left: dict[Any, Any] = {}
        found = []
        for place, functions in patches.items():
            ours = [one for one in functions if self.has(place, one)]
            left[place] = [one for one in functions if one not in ours]
            found += [self._described(one, x) for one in ours]
        return {**options, "patches": left}, found

    def has(self, place: Any, function: Any) -> bool:
        """Whether what is called at that place is computed by the ranks."""
        module, name = origin(function)
        kind = self._kinds.get(name)
        is_stock = PurePath(module.replace(".", "/")).parts[-2:] == _MODULE
        if kind is None or not is_stock or place != kind.place:
            return False
        return type(function.model_patch.model).__name__ == kind.comfyui_model

    def _described(self, patch: Any, x: torch.Tensor) -> dict[str, Any]:
        small = patch.model_patch.model
        if small not in self._on_ranks:
            of_small = weakref.ref(small)
            kind = type(small).__name__
            self._on_ranks[small] = self._remote.model_patch(kind, lambda: _tensors(of_small))
        kind = self._kinds[type(patch).__name__]
        hint = _hint(patch, kind.method, x)
        name = self._on_ranks[small].name
        return {"name": name, "strength": float(patch.strength), "hint": hint}


def _tensors(small: "weakref.ref[torch.nn.Module]") -> Mapping[str, torch.Tensor]:
    module = small()
    assert module is not None, "what is called in an evaluation is held by it"
    found: Mapping[str, torch.Tensor] = module.state_dict()
    return found


def _hint(patch: Any, method: str, x: torch.Tensor) -> torch.Tensor:
    """What the small model would be given of the picture: by ComfyUI's own code, without tokens.

    It is kept by the object, which encodes the picture anew for latents of another size.
    """
    asked = copy.copy(patch)
    small = _Listening(patch.model_patch.model, method)
    asked.model_patch = SimpleNamespace(model=small)
    asked({"x": x, "img": x.new_empty(x.shape[0], 0, 1), "txt": None, "block_index": 0})
    patch.encoded_image, patch.encoded_image_size = asked.encoded_image, asked.encoded_image_size
    return small.hint


class _Listening:
    """A small model whose method for the blocks remembers what it is given, and adds nothing."""

    hint: torch.Tensor

    def __init__(self, small: torch.nn.Module, method: str) -> None:
        self._small, self._method = small, method

    def __getattr__(self, name: str) -> Any:
        return self._listen if name == self._method else getattr(self._small, name)

    def _listen(self, tokens: torch.Tensor, hint: torch.Tensor, *_: Any) -> torch.Tensor:
        self.hint = hint
        return tokens
