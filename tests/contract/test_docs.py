"""Documents name files that exist, and every node has a help page."""

import json
import re
from pathlib import Path

import pytest

from support.paths import REPOSITORY

DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *REPOSITORY.glob("docs/*.md"),
    *REPOSITORY.glob("bench/*.md"),
]
# A path in backquotes below one of our folders; not one with a placeholder.
PATH = re.compile(r"`((?:nodes|tp_runtime|tests|docs|bench|scripts|web|examples)/[\w./]+)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    named = set(PATH.findall(document.read_text()))
    assert not [path for path in sorted(named) if not (REPOSITORY / path).exists()]


def test_documents_name_paths_at_all() -> None:
    assert len(PATH.findall((REPOSITORY / "ARCHITECTURE.md").read_text())) > 20


def test_every_node_has_a_help_page() -> None:
    schemas = json.loads((REPOSITORY / "tests/contract/node_schemas.json").read_text())
    pages = {page.stem for page in (REPOSITORY / "web/docs").glob("*.md")}
    assert pages == {schema["node_id"] for schema in schemas}
