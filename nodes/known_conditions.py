"""Says which constant inputs an evaluation has, by the objects of ComfyUI that they are made of.

ComfyUI makes them anew for every step, of the same objects at every step of a sampling. Where
nothing else has a part in that, they are known without a look at them, which would wait for the
GPU: so the ranks are asked for a step before its latent is computed. `RemoteModel.evaluate` has
them looked at meanwhile.
"""

import contextlib
import contextvars
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from comfy.patcher_extension import WrappersMP, get_all_wrappers

from ..tp_runtime.client import RemoteModel

Conditions = Sequence[list[dict[str, Any]] | None]

_known: contextvars.ContextVar[tuple[RemoteModel, Hashable] | None] = contextvars.ContextVar(
    "known_conditions", default=None
)


class Itself:
    """An object as a key: equal to itself alone, and there for as long as the key is."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


@contextlib.contextmanager
def known_conditions(
    remote: RemoteModel, conds: Conditions, model_options: Mapping[str, Any]
) -> Iterator[None]:
    """Within, evaluations of that model are made of these conditions, as `calc_cond_batch` does."""
    entries = [entry for cond in conds for entry in cond or ()]
    changed_by_nodes = (
        model_options.get("model_function_wrapper") is not None
        or any(
            get_all_wrappers(kind, model_options, is_model_options=True)
            for kind in (WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)
        )
        or any(entry.get("hooks") is not None for entry in entries)
    )
    known = None if changed_by_nodes else (remote, tuple(map(_objects, entries)))
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def known_as(remote: RemoteModel, transformer_options: Mapping[str, Any] | None) -> Hashable | None:
    """What `RemoteModel.evaluate` calls so; None: the constant inputs have to be looked at.

    `transformer_options`: of the evaluation; they say which of the conditions it is made of.
    """
    known, options = _known.get(), transformer_options or {}
    names = options.get("uuids"), options.get("cond_or_uncond")
    if known is None or known[0] is not remote or None in names:
        return None
    return known[1], *map(tuple, names)


def _objects(entry: Mapping[str, Any]) -> Hashable:
    made_of = entry["model_conds"].items()
    return Itself(entry), *(
        (name, Itself(one), Itself(getattr(one, "cond", None))) for name, one in made_of
    )
