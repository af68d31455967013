"""A time whose result was never compared is no result."""

import json
import math
from typing import Any

from bench.errors import is_wrong
from bench.speed_table import as_table
from support.paths import REPOSITORY

SINCE = "2026-11-28"  # rows of before have no error, and are read by the cost model only


def uncompared(row: dict[str, Any]) -> bool:
    error = row.get("error")
    return not isinstance(error, float | int) or not math.isfinite(error) or is_wrong(row)


def test_every_row_was_compared_with_one_gpu() -> None:
    for path in (REPOSITORY / "bench" / "results").glob("*.json"):
        if path.name >= SINCE:
            wrong = [row for row in json.loads(path.read_text()) if uncompared(row)]
            assert not wrong, path


def test_every_row_has_a_time() -> None:
    """A prompt that stalls while another is subtracted from it makes less than none."""
    for path in (REPOSITORY / "bench" / "results").glob("*.json"):
        rows = json.loads(path.read_text())
        wrong = [row for row in rows if not row.get("ms_step", row.get("ms_median")) > 0]
        assert not wrong, path


def test_what_counts_as_compared() -> None:
    row = {"tp": 2, "error": 2e-3}
    assert not uncompared(row)
    assert not uncompared({"tp": 2, "error": 6e-2, "noise": 4e-2})  # twice the noise is 8e-2
    assert uncompared({"tp": 2, "error": 6e-2, "noise": 1e-2})
    for error in (None, "0.002", math.nan, math.inf, 0.98):
        assert uncompared(row | {"error": error})
    assert uncompared({"tp": 2})


def test_readme_has_the_newest_rows() -> None:
    _, begin, rest = (REPOSITORY / "README.md").read_text().partition("<!-- speed -->\n")
    table, end, _ = rest.partition("<!-- end of speed -->\n")
    assert begin
    assert end
    assert table == as_table(), "write it: python -m bench.speed_table"
