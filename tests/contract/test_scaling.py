"""The predictions of `docs/scaling.md` are those of the code, and near what was measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.scaling import TABLES, Measured, measured, page
from tp_runtime.config import Layout
from tp_runtime.layouts.choice import MIN_GAIN, Estimate, fastest

TOLERANCE = 0.15
ROWS = measured()


def _name(row: Measured) -> str:
    case = row.case
    what = f"{case.model}-{case.layout}-{case.extent.side}-batch{case.batch}"
    return f"{what}-{case.device.name}-{row.commit}"


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_a_measured_step_is_near_its_prediction(row: Measured) -> None:
    assert abs(row.error) <= TOLERANCE, f"measured {row.ms}, {row.case.predict()}"


def test_rows_that_stream_weights_are_checked() -> None:
    assert {row.case.gpu_gib for row in ROWS} >= {None, 8, 14}


def test_auto_would_have_taken_one_of_the_fastest() -> None:
    """By predictions, wherever several layouts of as many GPUs have rows."""
    rivals: dict[object, dict[Layout, Measured]] = {}
    for row in ROWS:
        case = row.case
        if case.link.fused:
            key = replace(case, layout=Layout(1)), case.layout.num_gpus
            rivals.setdefault(key, {})[case.layout] = row
    compared = {key: rows for key, rows in rivals.items() if len(rows) > 1}
    assert len(compared) >= 10
    for key, rows in compared.items():
        predicted = {layout: Estimate(row.case.predict().ms, False) for layout, row in rows.items()}
        default = max(rows, key=lambda layout: layout.tp_size)
        taken = rows[fastest(default, predicted)]
        assert taken.ms <= (1 + MIN_GAIN) * min(row.ms for row in rows.values()), key


def test_rows_of_one_to_four_gpus_and_of_two_batches_are_checked() -> None:
    assert {row.case.layout.tp_size for row in ROWS} >= {1, 2, 4}
    assert {row.case.batch for row in ROWS} >= {1, 2}
    assert {row.case.model for row in ROWS} >= {"z_image", "flux", "qwen_image"}


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_pages_have_the_tables_of_today(path: Path) -> None:
    assert page(path) == path.read_text(), "run: python -m bench.scaling"
