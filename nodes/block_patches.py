"""Python code that nodes put into the blocks of a model: what of it matters, and what can travel.

ComfyUI keeps it in `transformer_options`, under `patches` (lists of functions) and
`patches_replace` (functions in the place of blocks), by the name of the place. A model calls what
it finds under the names that it knows; the rest has no effect on it.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .origins import is_of_reference_cache
from .unsupported import python_code_in_options

_QUOTED = re.compile(r"""["'](\w+)["']""")


def names_in_code(model: torch.nn.Module) -> frozenset[str]:
    """Every word in quotes, and every parameter, in the classes of a native model.

    It looks for no option and no argument but these.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__}
    found = [_names(cls) for cls in classes if cls.__module__.startswith("comfy.ldm.")]
    return frozenset().union(*found)


@functools.cache
def _names(cls: type) -> frozenset[str]:
    functions = [value for value in vars(cls).values() if inspect.isfunction(value)]
    parameters = [name for function in functions for name in inspect.signature(function).parameters]
    return frozenset(parameters).union(_QUOTED.findall(inspect.getsource(cls)))


def skipped_blocks(
    options: Mapping[str, Any], known: frozenset[str], has_references: bool
) -> dict[str, list[int]]:
    """The blocks that nodes have the model leave out: kind, such as "double_block" → indices.

    `has_references`: whether this evaluation is given reference images.

    Raises:
        UnsupportedFeatureError: the model, which knows the names `known`, would call other code.
    """
    for place, functions in (options.get("patches") or {}).items():
        if place not in known:
            continue
        for function in functions:
            if has_references or not is_of_reference_cache(function):
                raise python_code_in_options(f"patches.{place}", function)
    skipped: dict[str, list[int]] = {}
    for place, functions in (options.get("patches_replace") or {}).items():
        if place not in known:
            continue
        for (kind, index, *_), function in functions.items():
            if place != "dit" or not _returns_its_arguments(function):
                raise python_code_in_options(f"patches_replace.{place}.{kind}.{index}", function)
            skipped.setdefault(kind, []).append(index)
    return {kind: sorted(indices) for kind, indices in skipped.items()}


def _returns_its_arguments(replacement: Callable[[Any, Any], Any]) -> bool:
    """Whether a block's replacement gives back its arguments without looking at them.

    SkipLayerGuidanceDiT skips a block so. Nothing can be done with the arguments given here.
    """
    arguments = object()
    try:
        return replacement(arguments, object()) is arguments
    except (TypeError, AttributeError):
        return False
