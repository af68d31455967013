"""README's table of models is what the command `models` says."""

import json

import pytest

from support.paths import REPOSITORY
from tp_runtime.models import families
from tp_runtime.tools.cli import main
from tp_runtime.tools.models import as_table

BEGIN, END = "<!-- models -->\n", "<!-- end of models -->\n"
WRITE = "write it: python -c 'from tp_runtime.tools.models import as_table; print(as_table())'"


@pytest.fixture(autouse=True)
def of_the_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TP_RUNTIME_FAMILIES", raising=False)


def test_readme_has_the_table_of_today() -> None:
    _, begin, rest = (REPOSITORY / "README.md").read_text().partition(BEGIN)
    table, end, _ = rest.partition(END)
    assert (begin, end) == (BEGIN, END), "README.md has no such markers"
    assert table == as_table(), WRITE


def test_the_command_lists_every_family_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(families())
    for row in rows:
        assert row["models"]
        folder = row["diffusers_class"] is not None
        assert ("diffusers folder" in row["formats"]) == folder
        assert folder == (f"{row['label']} as a diffusers folder" not in row["not_yet"])
        assert 1 in row["gpu_counts"]
        assert row["parameters"] > 1e9
    assert [row["name"] for row in rows if row["diffusers_class"] is None] == ["minimax_h3"]
