"""The files of measured rows: one for each day and device."""

import json
from datetime import date
from pathlib import Path
from typing import Any


def add_rows(folder: Path, rows: list[dict[str, Any]], suffix: str = "") -> None:
    """Write them to the file of today and their device, after what that holds.

    rows: of one device, named by their key ``device``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{date.today()}-{rows[0]['device'].replace(' ', '-')}{suffix}.json"
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, *rows], indent=1) + "\n")
