"""What all node declarations of the pack have in common."""

import dataclasses
from collections.abc import Collection
from typing import Any

from comfy_api.latest import io

CATEGORY = "tensor parallel"

# Fields of newer ComfyUI releases; 0.3.75 raises TypeError for a field that it does not know.
_NEWER_FIELDS = frozenset({"search_aliases"})
_KNOWN_FIELDS = frozenset(field.name for field in dataclasses.fields(io.Schema))


def tp_schema(**fields: Any) -> io.Schema:
    """An `io.Schema` in the pack's category, without the fields that this ComfyUI lacks."""
    dropped = _NEWER_FIELDS - _KNOWN_FIELDS
    return io.Schema(
        category=CATEGORY,
        **{name: value for name, value in fields.items() if name not in dropped},
    )


def advanced(field: Any) -> Any:
    """An input that the page shows among the advanced ones, where it knows such."""
    field.extra_dict["advanced"] = True
    return field


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError for what is no choice: ComfyUI 0.3.75 does not check those of V3 nodes."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not in list: choose one of {', '.join(choices)}.")
