"""``python -m tp_runtime models``: the families, their files, and GPU counts that work."""

import argparse
import json
from typing import Any

from ..config import MAX_TP_SIZE
from ..files.checkpoint import FORMATS
from ..models import families
from ..models.family import Family

_FOLDER = "diffusers folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to print."""
    parser.description = "List the models that can be split over several GPUs."
    parser.add_argument("--json", action="store_true", help="as a list of objects")


def run(options: argparse.Namespace) -> None:
    """Print the list."""
    rows = [describe(family) for family in families().values()]
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        counts = ", ".join(map(str, row["gpu_counts"]))
        print(f"{row['label']} ({row['name']}): {', '.join(row['models'])}")
        print(f"  {row['parameters'] / 1e9:.1f} B parameters; on {counts} GPUs")
        if row["diffusers_class"] is not None:
            print(f"  also diffusers folders of {row['diffusers_class']}")
        if row["not_yet"]:
            print(f"  not yet: {', '.join(row['not_yet'])}")
    print(f"Files of each, as ComfyUI has them: {'; '.join(FORMATS)}.")


def describe(family: Family) -> dict[str, Any]:
    """What is supported of a family, as plain data; README's table is made of it."""
    table, folders = family.published.table, _takes_folders(family)
    return {
        "name": family.name,
        "label": family.label,
        "models": list(family.models),
        "not_yet": sorted(set(family.variants.values())),
        "parameters": sum(_count(shape) for shape in table.file_tensors.values()),
        "gpu_counts": [
            count
            for count in range(1, MAX_TP_SIZE + 1)
            if family.shares_tokens or count in table.plan.valid_tp_sizes(count)
        ],
        "diffusers_class": family.diffusers_class if folders else None,
        "formats": [*FORMATS, *([_FOLDER] if folders else [])],
    }


def _takes_folders(family: Family) -> bool:
    return f"{family.label} as a {_FOLDER}" not in family.variants.values()


def as_table() -> str:
    """What is supported, as the table in README: Markdown, with a line's end."""
    lines = ["| model | variants | not yet | parameters | GPU counts |", "|---|---|---|---|---|"]
    for row in map(describe, families().values()):
        cells = (
            row["label"],
            ", ".join(row["models"]),
            ", ".join(row["not_yet"]),
            f"{row['parameters'] / 1e9:.1f} B",
            ", ".join(map(str, row["gpu_counts"])),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
