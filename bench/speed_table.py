"""README's table of speed: what a user of ComfyUI gets, out of the rows of `bench.in_comfyui`.

python -m bench.speed_table
"""

import json
from pathlib import Path
from typing import Any

from bench.extents import Extent
from tp_runtime.models import family_named

RESULTS = Path(__file__).parent / "results"
LAYOUTS = ("1x1", "2x1", "4x1", "2x2")
HEADINGS = ("1 GPU", "2 GPUs", "4 GPUs", "4 GPUs as `2x2`")
SQUARE = Extent.parse("1024")  # of all rows that name no other
Case = tuple[str, Extent, float]  # model, size, CFG


def newest_rows() -> dict[Case, dict[str, dict[str, Any]]]:
    """Layout → its newest row, with the ``stock_ms`` of the same run.

    Of what the model usually makes, one at a time, bf16 files, by euler, without previews; not of
    runs beside others on the same machine (``alone`` false), which make the stock loader slower.
    """
    found: dict[Case, dict[str, dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*-comfyui.json")):
        stock_ms: dict[Case, float] = {}
        for row in json.loads(path.read_text()):
            plain = row.get("weights", "bf16") == "bf16" and row["previews"] == "none"
            plain = plain and row.get("alone", True) and not row.get("control")
            plain = plain and row.get("sampler", "euler") == "euler"
            extent = Extent.parse(str(row["side"]))
            usual = Extent.usual(family_named(row["model"]))
            if plain and extent in usual and row["batch"] == 1:
                key = row["model"], extent, row["cfg"]
                if row["layout"] == "stock":
                    stock_ms[key] = row["ms_step"]
                if key in stock_ms:  # the stock loader comes first
                    more = {"stock_ms": stock_ms[key]}
                    found.setdefault(key, {})[row["layout"]] = row | more
    return found


def as_table() -> str:
    """The table, as Markdown: ms per sampler step, and how often the stock loader's speed.

    The stock loader's time is of each row's own run: machines of one kind differ by a few percent.
    """
    lines = [
        "| | stock, 1 GPU | " + " | ".join(HEADINGS) + " | largest error | on |",
        "|---" * (len(HEADINGS) + 4) + "|",
    ]
    for (model, extent, cfg), rows in sorted(newest_rows().items(), key=_place):
        cells = [
            f"{rows[layout]['ms_step']:.0f} "
            f"({rows[layout]['stock_ms'] / rows[layout]['ms_step']:.1f} ×)"
            if layout in rows
            else ""
            for layout in LAYOUTS
        ]
        error = max(row["error"] for row in rows.values())
        size = "" if extent == SQUARE else f" {extent}"
        name = f"{family_named(model).label}{size}, CFG {cfg:g}"
        device = rows["stock"]["device"].removeprefix("NVIDIA ")
        stock = [rows[layout]["stock_ms"] for layout in LAYOUTS if layout in rows]
        ends = dict.fromkeys((f"{min(stock):.0f}", f"{max(stock):.0f}"))
        lines.append(
            f"| {name} | {' to '.join(ends)} | {' | '.join(cells)} | {error:.0e} | {device} |"
        )
    return "\n".join(lines) + "\n"


def _place(item: tuple[Case, Any]) -> tuple[int, str, float]:
    (model, extent, cfg), _ = item
    return extent.frames, model, cfg


if __name__ == "__main__":
    print(as_table(), end="")
