"""The families of models: one folder each, with everything that is particular to the family.

``family.py`` is what both processes know of it, as data; ``forward.py`` is the arithmetic, which
only ranks import. ``docs/adding_a_model.md`` is the guide. Packages of more families are named in
the environment (``TP_RUNTIME_FAMILIES``), where every process finds them.
"""

import functools
import importlib

from ..config import family_packages
from .family import Family
from .flux.family import FAMILY as FLUX
from .flux2.family import FAMILY as FLUX2
from .krea2.family import FAMILY as KREA2
from .ltx2.family import FAMILY as LTX2
from .minimax_h3.family import FAMILY as MINIMAX_H3
from .qwen_image.family import FAMILY as QWEN_IMAGE
from .qwen_image_21.family import FAMILY as QWEN_IMAGE_21
from .wan.family import FAMILY as WAN
from .z_image.family import FAMILY as Z_IMAGE


def families() -> dict[str, Family]:
    """Every family, by its name. Raises ImportError for a package that is not there."""
    ours = [Z_IMAGE, FLUX, FLUX2, KREA2, QWEN_IMAGE, QWEN_IMAGE_21, WAN, MINIMAX_H3, LTX2]
    found = [*ours, *map(_elsewhere, family_packages())]
    return {family.name: family for family in found}


def family_named(name: str) -> Family:
    """The family of that name. Raises KeyError."""
    return families()[name]


@functools.cache
def _elsewhere(package: str) -> Family:
    found: Family = importlib.import_module(f"{package}.family").FAMILY
    return found
