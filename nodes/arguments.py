"""From the arguments of a native model's forward to the plain data that the ranks get.

Tensors stay as they are; numbers, text, lists and dictionaries are copied. What is None or empty is
left out, since every native model treats it as absent.
"""

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from .block_patches import skipped_blocks
from .origins import is_exact_attention
from .unsupported import python_code_in_options, unknown_argument

# Keys of transformer_options that ComfyUI and its nodes use around the model, never inside it;
# and patches, of which `skip_blocks` is sent.
_LOCAL_OPTIONS = frozenset(
    {
        "patches",
        "patches_replace",
        "wrappers",
        "callbacks",
        "uuids",
        "cond_or_uncond",
        "sigmas",
        "sample_sigmas",
        "prefetch_dynamic_vbars",
    }
)
_LOCAL_PREFIXES = ("multigpu_",)
_ATTENTION = "optimized_attention_override"

_ABSENT = (None, {}, [])


def remote_inputs(bound: inspect.BoundArguments, known: frozenset[str]) -> dict[str, Any]:
    """The inputs of one evaluation: `x`, `timesteps` and the other arguments by their own names.

    `bound` are the arguments of a native forward; the models call their second one `timesteps` or
    `timestep`. `known` are the names in its code (`block_patches.names_in_code`).

    Raises:
        UnsupportedFeatureError: something that only works inside ComfyUI's process.
    """
    named = _by_name(bound, known)
    x_name, timesteps_name = list(bound.signature.parameters)[:2]
    inputs = {"x": named.pop(x_name), "timesteps": named.pop(timesteps_name)}
    options = named.pop("transformer_options", None) or {}
    plain_options = _plain_options(options)
    skipped = skipped_blocks(options, known, has_references=bool(named.get("ref_latents")))
    if skipped:
        plain_options["skip_blocks"] = skipped
    for name, value in named.items():
        plain = _plain_argument(value, name)
        if not _is_absent(plain):
            inputs[name] = plain
    return inputs | {"transformer_options": plain_options}


def _by_name(bound: inspect.BoundArguments, known: frozenset[str]) -> dict[str, Any]:
    """All arguments by name, those of `**kwargs` among the others if the model reads them.

    Wan's 5B is given `denoise_mask`, which was made timesteps before and its forward swallows.
    """
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            more = named.pop(parameter.name, {})
            named.update({name: value for name, value in more.items() if name in known})
    return named


def _plain_argument(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        items = {key: _plain_argument(item, f"{where}.{key}") for key, item in value.items()}
        if any(not isinstance(key, str) for key in items):
            raise unknown_argument(where, value)
        return items
    if isinstance(value, list | tuple):
        return [_plain_argument(item, f"{where}.{index}") for index, item in enumerate(value)]
    found, plain = _plain_leaf(value)
    if not found:
        raise unknown_argument(where, value)
    return plain


def _plain_options(options: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    """`transformer_options` without what is used in this process only.

    Besides the keys named above these are objects that are no functions: the state that a node
    keeps for its own wrapper (EasyCache does). Native models call functions that they find here
    and read data, so a function is refused and an object cannot concern them.
    """
    plain: dict[str, Any] = {}
    for key, value in options.items():
        if not where and (key in _LOCAL_OPTIONS or str(key).startswith(_LOCAL_PREFIXES)):
            continue
        if key == _ATTENTION and is_exact_attention(value):
            continue
        item = _plain_option(value, f"{where}{key}")
        if _is_absent(item):
            continue
        if not isinstance(key, str):
            raise unknown_argument(f"transformer_options.{where}{key}", key)
        plain[key] = item
    return plain


def _plain_option(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return _plain_options(value, f"{where}.")
    if isinstance(value, list | tuple):
        return [_plain_option(item, where) for item in value]
    if callable(value):
        raise python_code_in_options(where, value)
    return _plain_leaf(value)[1]


def _plain_leaf(value: Any) -> tuple[bool, Any]:
    """Whether `value` is a tensor or plain, and what to send for it."""
    if value is None or isinstance(value, bool | str | torch.Tensor):
        return True, value
    if isinstance(value, numbers.Integral):
        return True, int(value)
    if isinstance(value, numbers.Real):
        return True, float(value)
    return False, None


def _is_absent(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) and value in _ABSENT
