"""Model patches: ControlNets that ComfyUI calls in a model's blocks, and the ranks compute.

A node puts an object of ComfyUI's into the model, which holds a small model and a picture. The
ranks get the small model's weights once, and what ComfyUI's own code makes of the picture with each
evaluation. The object itself is never called with an evaluation's tokens.
"""

import copy
import threading
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

from ..tp_runtime.client import RemoteModel, RemotePatch
from .origins import module_of_nodes, origin

_MODULE = "comfy_extras.nodes_model_patch"


class ModelPatches:
    """The model patches that were ever used with one model."""

    def __init__(self, remote: RemoteModel) -> None:
        self._remote = remote
        self._kinds = {one.comfyui_patch: one for one in remote.info.family.model_patches}
        self._lock = threading.Lock()  # evaluations of one step are prepared in threads
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
            InputError: a small model does not fit the model.
        """
        ours = self.of(options)
        if not ours:
            return options, []
        left = {
            place: [one for one in functions if not _is_among(one, ours)]
            for place, functions in options["patches"].items()
        }
        with self._lock:
            return {**options, "patches": left}, [self._described(one, x) for one in ours]

    def of(self, options: Mapping[Any, Any]) -> list[Any]:
        """Of `transformer_options`, the objects that the ranks compute, in their order."""
        patches = options.get("patches")
        if not self._kinds or not isinstance(patches, Mapping):
            return []
        found: list[Any] = []
        for functions in patches.values():
            for one in functions if isinstance(functions, list | tuple) else ():
                if not _is_among(one, found) and self._is_ours(one, patches):
                    found.append(one)
        return found

    def _is_ours(self, function: Any, patches: Mapping[Any, Any]) -> bool:
        """Whether it is of a known kind, in the places where ComfyUI's node puts it."""
        module, name = origin(function)
        kind = self._kinds.get(name)
        if kind is None or module_of_nodes(module) != _MODULE:
            return False
        places = {place for place, others in patches.items() if _is_among(function, others)}
        small = function.model_patch.model
        return places == {*kind.places} and type(small).__name__ == kind.comfyui_model

    def _described(self, patch: Any, x: torch.Tensor) -> dict[str, Any]:
        small, kind = patch.model_patch.model, self._kinds[type(patch).__name__]
        if small not in self._on_ranks:
            of_small = weakref.ref(small)
            self._on_ranks[small] = self._remote.model_patch(
                kind.comfyui_model, lambda: _tensors(of_small)
            )
        shape = list(x.shape)
        if kind.whole:
            patches = self._remote.info.sizes.geometry.patch[1:]
            shape[-2:] = (
                size + -size % side for size, side in zip(shape[-2:], patches, strict=True)
            )
        return {
            "name": self._on_ranks[small].name,
            "strength": float(patch.strength),
            "hint": _hint(patch, x.new_empty(shape)),
            **{name: getattr(small, name) for name in kind.settings},
        }


def _is_among(one: Any, others: Any) -> bool:
    return any(one is other for other in others)


def _tensors(small: "weakref.ref[torch.nn.Module]") -> Mapping[str, torch.Tensor]:
    module = small()
    assert module is not None, "what is called in an evaluation is held by it"
    found: Mapping[str, torch.Tensor] = module.state_dict()
    return found


def _hint(patch: Any, x: torch.Tensor) -> torch.Tensor:
    """What the small model would be given of the picture: by ComfyUI's own code, without tokens.

    It is kept by the object, which encodes the picture anew for latents of another size.
    """
    asked = copy.copy(patch)
    small = _Listening(patch.model_patch.model)
    asked.model_patch = SimpleNamespace(model=small)
    asked.temp_data = None
    tokens = x.new_empty(x.shape[0], 0, 1)
    given = {"x": x, "img": tokens, "img_input": tokens, "txt": tokens}
    asked({**given, "block_index": 0, "block_type": "noise_refiner"})
    patch.encoded_image, patch.encoded_image_size = asked.encoded_image, asked.encoded_image_size
    return small.hint


class _Listening:
    """A small model that remembers the hint that it is called with, and computes nothing.

    Its methods are those that ComfyUI's objects call in a model's first block.
    """

    hint: torch.Tensor

    def __init__(self, small: torch.nn.Module) -> None:
        self._small = small

    def __getattr__(self, name: str) -> Any:
        return getattr(self._small, name)

    def control_block(self, tokens: torch.Tensor, hint: torch.Tensor, _index: int) -> torch.Tensor:
        self.hint = hint
        return tokens

    def __call__(self, _text: torch.Tensor, hint: torch.Tensor, *_: Any) -> torch.Tensor:
        self.hint = hint
        return hint

    def forward_noise_refiner_block(
        self, _index: int, hint: torch.Tensor, *_: Any
    ) -> tuple[None, torch.Tensor]:
        return None, hint
