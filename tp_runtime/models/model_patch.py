"""What a model patch is, as data: a small model that is called in the blocks of a larger one.

ComfyUI's word, for ControlNets above all (``ModelPatchLoader``). ComfyUI's process has read its
weights already and gives them to the ranks, each of which keeps its slices.
"""

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

from ..errors import InputError
from ..sharding.parts import Shape
from ..sharding.table import Table


class ModelPatch:
    """The sizes of one model patch, and what follows from them. Subclasses are frozen dataclasses.

    ``label``: for people. ``comfyui_patch``: ComfyUI's class of what a node puts into a model, and
    ``comfyui_model`` that of the small model in it. ``places``: where it puts it, in ComfyUI's
    words. ``settings``: attributes of the small model that an evaluation is told, too. ``whole``:
    ComfyUI's code is given latents with sides in whole patches. ``module``: the one beside theirs
    whose ``build`` makes the ranks' module.
    """

    label: ClassVar[str]
    comfyui_patch: ClassVar[str]
    comfyui_model: ClassVar[str]
    places: ClassVar[tuple[str, ...]]
    settings: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False
    module: ClassVar[str] = "control"

    @classmethod
    def of_tensors(cls, shapes: Mapping[str, Shape]) -> "ModelPatch":
        """From the small model's tensors. Raises KeyError for one that is missing."""
        raise NotImplementedError

    @property
    def table(self) -> Table:
        """The tensors that ranks compute with, by ComfyUI's names."""
        raise NotImplementedError

    def check_fits(self, label: str, sizes: Any) -> None:
        """Raises InputError if it was made for models of other sizes than these of ``label``."""
        raise NotImplementedError

    def unfit(self, has: str, label: str, model_has: str) -> InputError:
        """For ``check_fits``; ``has``, ``model_has``: the numbers that differ."""
        return InputError(
            f"The {self.label} has {has}; {label} has {model_has} here. Use one made for this "
            "model."
        )

    def build(self) -> Any:
        """The module. Call it under ``torch.device("meta")``. For ranks only."""
        package = type(self).__module__.rpartition(".")[0]
        return importlib.import_module(f"{package}.{self.module}").build(self)
