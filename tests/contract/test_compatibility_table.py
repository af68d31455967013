"""`docs/compatibility.md` says what `tests/comfy/test_compatibility.py` tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import compatibility_table
from support.compatibility import FAMILIES, Row
from support.compatibility_rows import ROWS
from support.compatibility_table import PAGE, page


def test_page_has_the_tested_rows() -> None:
    """Else: python tests/support/compatibility_table.py."""
    text = PAGE.read_text()
    assert page(text) == text


def test_the_command_that_writes_the_page(tmp_path: Path) -> None:
    text = PAGE.read_text()
    copy = tmp_path / "page.md"
    copy.write_text(text.replace("CFGNorm", "no node"))
    subprocess.run([sys.executable, compatibility_table.__file__, copy], check=True, cwd=tmp_path)
    assert copy.read_text() == text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_uses_the_nodes_that_it_names(row: Row) -> None:
    for family in FAMILIES:
        if row.expected(family, newer=True):
            used = {item["class_type"] for item in row.prompt(family).values()}
            assert set(re.findall(r"`([^`]+)`", row.title)) <= used


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_enough_workflows() -> None:
    for family in FAMILIES:
        assert len([row for row in ROWS if row.expected(family)]) >= 40
