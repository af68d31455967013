"""Says which constant inputs an evaluation has, by the objects of ComfyUI that they are made of.

ComfyUI makes them anew for every step, of the same objects at every step of a sampling. Where
nothing else has a part in that, they are known without a look at them, which would wait for the
GPU: so the ranks are asked for a step before its latent is computed. `RemoteModel.evaluate` has
them looked at meanwhile.
"""

import contextlib
import contextvars
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, get_all_wrappers

from ..tp_runtime.client import RemoteModel

Conditions = Sequence[list[dict[str, Any]] | None]

_known: contextvars.ContextVar[tuple[RemoteModel, Hashable] | None] = contextvars.ContextVar(
    "known_conditions", default=None
)


class Itself:
    """An object as a key: equal to itself alone, as long as it lives. The key does not keep it."""

    def __init__(self, value: object) -> None:
        self._reference = weakref.ref(value)
        self._hash = id(value)

    def __eq__(self, other: object) -> bool:
        value = self._reference()
        return isinstance(other, Itself) and value is not None and value is other._reference()

    def __hash__(self) -> int:
        return self._hash


@contextlib.contextmanager
def known_conditions(
    remote: RemoteModel, conds: Conditions, model_options: Mapping[str, Any]
) -> Iterator[None]:
    """Within, evaluations of that model are made of these conditions, as `calc_cond_batch` does."""
    entries = [entry for cond in conds for entry in cond or ()]
    unknown = has_code_of_nodes(model_options) or any(
        entry.get("hooks") is not None for entry in entries
    )
    known = None if unknown else (remote, tuple(map(_objects, entries)))
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def has_code_of_nodes(model_options: Mapping[str, Any]) -> bool:
    """Whether nodes have functions called around every evaluation, which may change its inputs."""
    return model_options.get("model_function_wrapper") is not None or any(
        get_all_wrappers(kind, model_options, is_model_options=True)
        for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
    )


def known_as(remote: RemoteModel, transformer_options: Mapping[str, Any] | None) -> Hashable | None:
    """What `RemoteModel.evaluate` calls so; None: the constant inputs have to be looked at.

    `transformer_options`: of the evaluation; they say which of the conditions it is made of.
    """
    known, options = _known.get(), transformer_options or {}
    names = options.get("uuids"), options.get("cond_or_uncond")
    if known is None or known[0] is not remote or None in names:
        return None
    return known[1], *map(tuple, names)


def leaves(value: Any) -> Iterator[Any]:
    """What a condition holds, out of the lists that it may be in."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def _objects(entry: Mapping[str, Any]) -> Hashable:
    """Without the entry itself: ComfyUI's context windows make it anew of the same conditions."""
    return tuple(entry.get("area") or ()), *(
        (name, *map(Itself, (one, *_tensors(one)))) for name, one in entry["model_conds"].items()
    )


def _tensors(cond: Any) -> Iterator[torch.Tensor]:
    held = leaves(getattr(cond, "cond", None))
    return (value for value in held if isinstance(value, torch.Tensor))
