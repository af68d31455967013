"""What ComfyUI's own model of a family looks for in what it is given, read from its code.

Packs keep state of their own in `transformer_options` and among a model's arguments. What the
native model never looks at has no effect there, so it has none here: it is not even looked at.
"""

import functools
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

import comfy.ldm.modules.attention
import torch

_QUOTED = re.compile(r"""["'](\w+)["']""")
_KEYWORD = re.compile(r"""kwargs(?:\.get\(|\.pop\(|\[)["'](\w+)["']""")
_OPTION = r"""transformer_options(?:\.get\(|\[)\s*["'](\w+)["']"""
_READ = re.compile(rf"""{_OPTION}|["'](\w+)["'] (?:not )?in transformer_options""")
_PLACED = re.compile(r"self\.process_img\(([^()]*)\)")
_WRITTEN = re.compile(rf"{_OPTION}\]\s*=[^=]")


@dataclass(frozen=True)
class NativeCode:
    """`words`: every word in quotes, also of functions and plain classes beside the model's, which
    take parts of its arguments. `arguments`: what the model's forward takes by name.

    `options`: keys of `transformer_options` that are read, but for those that the model has put
    there itself.
    """

    words: frozenset[str]
    arguments: frozenset[str]
    options: frozenset[str]

    @classmethod
    def of(cls, model: torch.nn.Module) -> "NativeCode":
        """From the sources of the model's classes, of the functions beside the model's, and of
        ComfyUI's attention functions.
        """
        classes = {base for module in model.modules() for base in _native(type(module).__mro__)}
        sources = [_source(found) for found in classes]
        own = _native(type(model).__mro__)
        forwards = [
            method for base in own for name, method in vars(base).items() if "forward" in name
        ]
        named = {name for method in forwards for name in inspect.signature(method).parameters}
        beside = [
            found
            for base in own
            for found in vars(inspect.getmodule(base)).values()
            if getattr(found, "__module__", "") == base.__module__
        ]
        plain = [
            _source(found)
            for found in beside
            if isinstance(found, type) and not issubclass(found, torch.nn.Module)
        ]
        functions = [_source(found) for found in beside if inspect.isfunction(found)]
        options = [*sources, *functions, _source(comfy.ldm.modules.attention.wrap_attn)]
        return cls(
            _all(_QUOTED, [*sources, *plain, *functions]),
            _all(_KEYWORD, map(_source, own)) | named,
            _all(_READ, options) - _all(_WRITTEN, options),
        )


def moves_references(model: torch.nn.Module) -> bool:
    """Whether a model places reference pictures by its options, as it places the image.

    Since 0.33 `rope_options` of FLUX's class do (`_forward` in comfy/ldm/flux/model.py).
    """
    placed = _all(_PLACED, map(_source, _native(type(model).__mro__)))
    return bool(placed) and all("transformer_options" in arguments for arguments in placed)


def _native(classes: Iterable[type]) -> list[type]:
    return [found for found in classes if found.__module__.startswith("comfy.ldm.")]


@functools.cache
def _source(found: object) -> str:
    return inspect.getsource(found)  # type: ignore[arg-type]  # a class or a function


def _all(pattern: re.Pattern[str], sources: Iterable[str]) -> frozenset[str]:
    """What the groups of a pattern have matched."""
    matches = (match for source in sources for match in pattern.finditer(source))
    return frozenset(group for match in matches for group in match.groups() if group)
