"""The tables of `docs/compatibility.md`: the tested workflows, and what came of the templates.

    python tests/support/compatibility_table.py [PAGE]

writes them into the page, between the lines that mark their place.
"""

import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":  # its own folder is on the path then, which is no place to import from
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS.parent)]

from support.compatibility import FAMILIES, Family, Row
from support.compatibility_rows import ELSEWHERE, SECTIONS
from support.official_templates import recorded
from support.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "compatibility.md"
BEGIN = "<!-- written by tests/support/compatibility_table.py -->"
END = "<!-- end of what is written -->"


def tables() -> str:
    """A table for each section, and one of the nodes without a workflow, in Markdown."""
    parts = []
    heads = [family.label for family in FAMILIES]
    for title, rows in SECTIONS.items():
        cells = [[row.title, *_cells(row)] for row in rows]
        parts.append(f"### {title}\n\n{_table(['workflow with', *heads], cells)}")
    by_reason = defaultdict(list)
    for name, reason in ELSEWHERE.items():
        by_reason[reason].append(f"`{name}`")
    others = [[", ".join(names), reason] for reason, names in by_reason.items()]
    parts.append(f"### Other nodes\n\n{_table(['nodes', 'what they do'], others)}")
    parts.append(
        f"### ComfyUI's templates\n\n{_table(['template', 'loads', 'result'], _templates())}"
    )
    return "\n\n".join(parts)


def _templates() -> list[list[str]]:
    """The official templates, as `tests/web/test_official_templates.py` wrote them down."""
    found = []
    for name, came in recorded().items():
        result = "✓" if came["result"] == "equal" else f"{came['result']}: {came['why']}"
        files = ", ".join(f"`{file.removesuffix('.safetensors')}`" for file in came["files"])
        found.append([f"`{name}`", files, result])
    return found


def page(text: str) -> str:
    """The page with its tables replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _cells(row: Row) -> list[str]:
    return [_cell(row, family) for family in FAMILIES]


def _cell(row: Row, family: Family) -> str:
    """What is expected on 0.3.75, and on newer releases where that is something else."""
    older, newer = row.expected(family), row.expected(family, newer=True)
    cell = older.cell if older else "–"
    return f"{cell}; 0.33: {newer.cell}" if newer and newer != older else cell


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    written = Path(sys.argv[1]) if sys.argv[1:] else PAGE
    written.write_text(page(written.read_text()))
