"""The model families: one file each, with everything that is particular to the family.

A family's module has ``FAMILY``, ``LABEL``, ``UNUSED`` and the functions ``recognises``,
``infer_config``, ``file_tensors``, ``sources``, ``latent_shape``, ``plan``, ``stages``; for
diffusers folders ``DIFFUSERS_CLASS``, ``SWAPPED_HALVES`` and ``diffusers_config`` (all that
ComfyUI's process needs: no vLLM, no diffusers); and ``build`` and ``Driver`` (what a rank needs).
``docs/adding_a_model.md`` is the guide.
"""

from types import ModuleType

from . import flux, qwen_image, z_image

FAMILIES: dict[str, ModuleType] = {module.FAMILY: module for module in (z_image, flux, qwen_image)}


def family(name: str) -> ModuleType:
    """The module of a family. Raises KeyError."""
    return FAMILIES[name]
