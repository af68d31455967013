"""From the arguments of a native model's forward to the plain data that the ranks get.

Tensors stay as they are; numbers, text, lists and dictionaries are copied. What is None or empty is
left out, since every native model treats it as absent; so is what it never looks at
(`native_code.py`), whatever that is. The rest travels, or is refused by name.
"""

import inspect
from collections.abc import Collection, Iterator, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import torch

from .block_patches import skipped_blocks
from .native_code import NativeCode
from .origins import is_exact_attention
from .unsupported import python_code_in_options, unknown_argument, unknown_option

_PATCHES = ("patches", "patches_replace")  # of which `skip_blocks` is sent
# What one argument may hold: a ControlNet's residuals are one for each block of each kind.
_MAX_ITEMS = 1024
_MAX_DEPTH = 3
_MAX_TEXT = 256
_INTEGERS = range(-(2**63), 2**64)  # of 64 bits, with or without a sign: seeds have none
_MAX_NUMBER = 2**63


def remote_inputs(
    bound: inspect.BoundArguments,
    code: NativeCode,
    unused: Collection[str] = (),
    options: Collection[str] = (),
    numbers: Mapping[str, float] = MappingProxyType({}),
    listed: Collection[str] = (),
) -> dict[str, Any]:
    """The inputs of one evaluation: `x`, `timesteps` and the other arguments by their own names.

    `bound` are the arguments of a native forward; the models call their second one `timesteps` or
    `timestep`. `unused` and `options`: those of the model's `Sizes`. `numbers`: options that are
    numbers, and what they are where nobody sets them. `listed`: options that are numbers, or
    lists of whole ones.

    Raises:
        UnsupportedFeatureError: something that only works inside ComfyUI's process.
    """
    named = _by_name(bound, code)
    x_name, timesteps_name = list(bound.signature.parameters)[:2]
    inputs = {"x": named.pop(x_name), "timesteps": named.pop(timesteps_name)}
    given_options = named.pop("transformer_options", None) or {}
    for name, value in named.items():
        if name not in unused:
            plain = _plain_argument(value, name, code.words, unused)
            if not _is_absent(plain):
                inputs[name] = plain
    read = code.options - {*unused}
    found = _plain_options(given_options, read, code.words, options, numbers, listed)
    plain_options = dict(numbers) | dict(found)
    has_references = bool(named.get("ref_latents"))
    if skipped := skipped_blocks(given_options, code.words, has_references):
        plain_options["skip_blocks"] = skipped
    return inputs | {"transformer_options": plain_options}


def _by_name(bound: inspect.BoundArguments, code: NativeCode) -> dict[str, Any]:
    """All arguments by name; of those in `**kwargs`, the ones that the model looks for.

    Wan's 5B is given `denoise_mask`, which was made timesteps before and its forward swallows.
    """
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            more = named.pop(parameter.name, {})
            named.update({name: value for name, value in more.items() if name in code.arguments})
    return named


def _plain_argument(
    value: Any,
    where: str,
    words: frozenset[str],
    unused: Collection[str],
    depth: int = _MAX_DEPTH,
) -> Any:
    """`value` as plain data; of dictionaries, the keys among `words`, which the model looks for."""
    if isinstance(value, Mapping | list | tuple):
        if not depth or len(value) > _MAX_ITEMS:
            raise unknown_argument(where, value)
        if isinstance(value, Mapping):
            items = {key: item for key, item in value.items() if key in words}
            return {
                key: _plain_argument(item, f"{where}.{key}", words, unused, depth - 1)
                for key, item in items.items()
                if f"{where}.{key}" not in unused
            }
        return [
            _plain_argument(item, f"{where}.{index}", words, unused, depth - 1)
            for index, item in enumerate(value)
        ]
    if value is None or isinstance(value, bool | torch.Tensor):
        return value
    if isinstance(value, str) and len(value) <= _MAX_TEXT and value.isprintable():
        return value
    if isinstance(value, Integral) and int(value) in _INTEGERS:
        return int(value)
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value)
    raise unknown_argument(where, value)


def _plain_options(
    options: Mapping[Any, Any],
    read: frozenset[str],
    words: frozenset[str],
    supported: Collection[str],
    numbers: Collection[str],
    listed: Collection[str],
) -> Iterator[tuple[str, Any]]:
    """Of `transformer_options`, what the native model computes with: numbers, and lists and
    dictionaries of them.
    """
    for name in sorted(read - set(_PATCHES)):
        value = options.get(name)
        if value is None:
            continue
        if callable(value) and is_exact_attention(value):
            continue
        if callable(value):
            raise python_code_in_options(name, value)
        if name in numbers:
            yield name, _number(value, name)
            continue
        if name in listed:
            yield name, _plain_option(value, name)
            continue
        if not isinstance(value, Mapping) or name not in supported:
            raise unknown_option(name, value)
        known = {key: number for key, number in value.items() if key in words}
        if found := {key: _number(number, f"{name}.{key}") for key, number in known.items()}:
            yield name, found


def _number(value: Any, where: str) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if not isinstance(value, Real) or abs(value) > _MAX_NUMBER:
        raise unknown_option(where, value)
    return float(value)


def _plain_option(value: Any, where: str) -> float | list[int]:
    """A number, or a list of whole ones. A set of them, too, in order."""
    if not isinstance(value, set | frozenset | list | tuple):
        return _number(value, where)
    if len(value) > _MAX_ITEMS or not all(isinstance(item, Integral) for item in value):
        raise unknown_option(where, value)
    return sorted(map(int, value))


def _is_absent(plain: Any) -> bool:
    return plain is None or (isinstance(plain, dict | list) and not plain)
