"""The texts of the page: every language has them all, and those of the nodes are the schemas'."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY

ENGLISH = REPOSITORY / "locales/en"
LANGUAGES = [folder for folder in ENGLISH.parent.iterdir() if folder != ENGLISH]
FILES = sorted(path.name for path in ENGLISH.glob("*.json"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(tree, str):
        return {path: tree}
    return {k: v for key, item in tree.items() for k, v in leaves(item, (*path, key)).items()}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", LANGUAGES, ids=lambda path: path.name)
def test_a_language_has_every_text(language: Path, name: str) -> None:
    english, other = leaves(read(ENGLISH / name)), leaves(read(language / name))
    assert other.keys() == english.keys()
    for key, text in english.items():
        assert set(re.findall(r"\{\w+\}", other[key])) == set(re.findall(r"\{\w+\}", text)), key


def test_the_nodes_texts_are_the_schemas(dump: dict[str, Any]) -> None:
    """For a change that is meant: `dump_node_schemas.py --write`, and the other languages."""
    assert read(ENGLISH / "nodeDefs.json") == dump["locale"]


def test_every_text_that_the_page_asks_for_is_there() -> None:
    texts = read(ENGLISH / "main.json")["tensorParallel"]
    scripts = "".join(path.read_text() for path in (REPOSITORY / "web").glob("*.js"))
    asked = set(re.findall(r'\btext\(\s*"([^"]+)"', scripts))
    assert len(asked) > 15
    assert asked <= texts.keys()
    for state in ("starting", "ready", "busy", "failed", "closed"):
        assert f"state.{state}" in texts


def test_settings_and_commands_are_translated() -> None:
    page = (REPOSITORY / "web/index.js").read_text()
    page += (REPOSITORY / "web/gpu_counts.js").read_text()
    known = read(ENGLISH / "settings.json").keys() | read(ENGLISH / "commands.json").keys()
    ids = set(re.findall(r'"(TensorParallel\.[\w.]+)"', page))
    assert {name.replace(".", "_") for name in ids} == known
