"""Python code that nodes put into the blocks of a model: what of it matters, and what can travel.

ComfyUI keeps it in `transformer_options`, under `patches` (lists of functions) and
`patches_replace` (functions in the place of blocks), by the name of the place. A model calls what
it finds under the names that it knows; the rest has no effect on it.
"""

from collections.abc import Mapping
from typing import Any

from .origins import is_of_reference_cache
from .unsupported import python_code_in_options, unknown_option


def skipped_blocks(
    options: Mapping[Any, Any], known: frozenset[str], has_references: bool
) -> dict[str, list[int]]:
    """The blocks that nodes have the model leave out: kind, such as "double_block" → indices.

    `has_references`: whether this evaluation is given reference images.

    Raises:
        UnsupportedFeatureError: the model, which knows the names `known`, would call other code.
    """
    for place, functions in _by_place(options, "patches", known).items():
        if not isinstance(functions, list | tuple):
            raise unknown_option(f"patches.{place}", functions)
        for function in functions:
            if has_references or not is_of_reference_cache(function):
                raise python_code_in_options(f"patches.{place}", function)
    skipped: dict[str, list[int]] = {}
    for place, functions in _by_place(options, "patches_replace", known).items():
        if not isinstance(functions, Mapping):
            raise unknown_option(f"patches_replace.{place}", functions)
        for block, function in functions.items():
            if not isinstance(block, tuple) or len(block) < 2 or block[0] not in known:
                continue
            kind, index = block[:2]
            if place != "dit" or not _returns_its_arguments(function):
                raise python_code_in_options(f"patches_replace.{place}.{kind}.{index}", function)
            if len(block) == 2 and isinstance(index, int):
                skipped.setdefault(kind, []).append(index)
    return {kind: sorted(indices) for kind, indices in skipped.items()}


def _by_place(options: Mapping[Any, Any], name: str, known: frozenset[str]) -> dict[str, Any]:
    """What is there for the places that the model knows."""
    found = options.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise unknown_option(name, found)
    return {place: functions for place, functions in found.items() if place in known}


def _returns_its_arguments(replacement: Any) -> bool:
    """Whether a block's replacement gives back its arguments without looking at them.

    SkipLayerGuidanceDiT skips a block so. Nothing can be done with the arguments given here, so a
    function that looks at them may raise anything.
    """
    arguments = object()
    try:
        return replacement(arguments, object()) is arguments
    except BaseException:  # noqa: BLE001 - foreign code: of whatever type, it is no skipped block
        return False
