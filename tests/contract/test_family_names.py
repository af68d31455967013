"""Families are named in their own folders and in the list of families, nowhere else in the code.

Comments and docstrings may name them. What must name one in the code is listed below.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from tp_runtime.models import Family, families

FAMILIES = REPOSITORY / "tp_runtime" / "models"
# As a word (`FLUX.1`, `flux_text`), or as a word of a class's name (`TinyFluxSizes`); not `influx`.
NAME = re.compile(
    r"(?<![A-Za-z])(?i:z_image|z-image|flux|qwen_image|qwen-image|wan|ltx|krea|minimax)(?![a-z])"
    r"|(ZImage|Flux|QwenImage|Wan|LTX|Krea|MiniMax)(?![a-z])"
)
# File → pieces of its code that name a family: texts for a person, and rows that were measured.
ALLOWED = {
    # A tooltip gives examples of distilled models.
    "nodes/sampler.py": ("distilled models such as Z-Image",),
    # What was measured is said to a person.
    "tp_runtime/tools/plan.py": ("measured for FLUX.1",),
    # Of other models, some are called after a family of ours, or have its signature.
    "tp_runtime/models/others.py": (
        "_FLUX",
        "Z-Image in pixel space",
        "LTX-Video",
        "qwen_image",
        "z_image",
    ),
    # A ControlNet is of one model.
    "bench/controls.py": ("z_image", "qwen_image", "ZImage"),
    # The tables of the limits and links are of one model, that of cards of three; the profile is
    # that of RESULTS.md, and other rows were measured with these models.
    "bench/scaling.py": ("flux", "z_image", "qwen_image", "wan"),
}


def _files() -> Iterator[Path]:
    for path in sorted((REPOSITORY / "tp_runtime").rglob("*.py")):
        of_a_family = FAMILIES in path.parents[1:]
        if not of_a_family and path != FAMILIES / "__init__.py":
            yield path
    yield from sorted((REPOSITORY / "nodes").rglob("*.py"))
    yield from sorted((REPOSITORY / "bench").glob("*.py"))


def _code(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and of every string that is no docstring."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        first = (
            node.body[0] if isinstance(getattr(node, "body", None), list) and node.body else None
        )
        if isinstance(first, ast.Expr):
            docstrings.add(first.value)
    line = 1
    for node in ast.walk(tree):
        line = getattr(node, "lineno", line)
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and node not in docstrings:
                yield line, node.value
            continue
        for _, value in ast.iter_fields(node):  # identifiers, modules and their parts
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    yield line, text


def _named(source: str, allowed: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    found = []
    for line, text in _code(source):
        rest = text
        for piece in allowed:
            rest = rest.replace(piece, "")
        if NAME.search(rest):
            found.append((line, text))
    return found


@pytest.mark.parametrize(
    "path", list(_files()), ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)
def test_no_family_is_named(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(REPOSITORY).as_posix(), ())
    assert not _named(path.read_text(), allowed)


@pytest.mark.parametrize("family", families().values(), ids=lambda family: family.name)
def test_every_family_is_looked_for(family: Family) -> None:
    for name in (family.name, family.name.upper(), family.label, family.sizes.__name__):
        assert NAME.search(name), name
    assert (FAMILIES / family.name / "family.py").is_file()


@pytest.mark.parametrize(("name", "pieces"), ALLOWED.items())
def test_what_is_allowed_is_there(name: str, pieces: tuple[str, ...]) -> None:
    texts = [text for _, text in _named((REPOSITORY / name).read_text())]
    for piece in pieces:
        assert any(piece in text for text in texts), f"{piece!r} is not needed any more"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Of FLUX.1."""\nx = 1  # z_image\n', 0),
        ("def f():\n    'Of Qwen-Image.'\n", 0),
        ("influx = 'refluxed'", 0),
        ("from .flux.family import FAMILY", 1),
        ("name = 'z_image'", 1),
        ("name = 'flux2'", 1),
        ("class QwenImageSizes: ...", 1),
        ("from x import Z_IMAGE, TinyFluxModel", 2),
        ("print(f'a Z-Image of {size}')", 1),
        ("f(flux=1)", 1),
        ("wanted = 'what we want'", 0),
        ("class WanSizes: ...", 1),
        ("class LTX2Sizes: ...", 1),
        ("class Krea2Sizes: ...", 1),
    ],
)
def test_names_are_found_in_code_only(source: str, count: int) -> None:
    assert len(_named(source)) == count
