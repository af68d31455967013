"""Layouts as text, and the decision between them."""

import pytest

from tp_runtime.config import Layout
from tp_runtime.layouts.choice import MIN_GAIN, Estimate, estimate, fastest

PLAIN, MIXED, COPIES = Layout(4), Layout(2, 2), Layout(1, 4)
SHARED = Layout(2, sequence_size=2)


@pytest.mark.parametrize("layout", [PLAIN, MIXED, COPIES, SHARED], ids=str)
def test_text_and_back(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout
    assert layout.num_gpus == 4


def test_workflows_keep_their_meaning() -> None:
    assert (str(PLAIN), str(MIXED), str(SHARED)) == ("4x1", "2x2", "2x2x1")


@pytest.mark.parametrize("text", ["", "2", "2x", "x2", "2x2x2x2", "2x0x1", "2*2", "-2x2", "tp"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="TP size x batch groups"):
        Layout.parse(text)


def test_predictions_are_scaled_to_what_was_measured() -> None:
    predictions = {PLAIN: 10.0, MIXED: 8.0, COPIES: 6.0}
    found = estimate(predictions, {PLAIN: 20.0}, predictions.__getitem__)
    assert found == {
        PLAIN: Estimate(20.0, measured=True),
        MIXED: Estimate(16.0, measured=False),
        COPIES: Estimate(12.0, measured=False),
    }
    assert fastest(PLAIN, found) == COPIES


def test_without_predictions_only_measurements_decide() -> None:
    layouts = (PLAIN, MIXED, COPIES)
    assert fastest(PLAIN, estimate(layouts, {}, None)) == PLAIN
    assert fastest(PLAIN, estimate(layouts, {MIXED: 5.0}, None)) == PLAIN
    assert fastest(PLAIN, estimate(layouts, {PLAIN: 6.0, MIXED: 5.0}, None)) == MIXED


def test_what_was_measured_stays_where_little_more_is_predicted() -> None:
    """Another layout is another load."""
    layouts = {PLAIN: 100.0, MIXED: 80.0, COPIES: 78.0, SHARED: 70.0}
    found = estimate(layouts, {PLAIN: 100.0, MIXED: 80.0}, layouts.__getitem__)
    assert fastest(PLAIN, found) == SHARED
    del found[SHARED]
    assert fastest(PLAIN, found) == MIXED


def test_a_small_gain_changes_nothing() -> None:
    small = {PLAIN: 100.0, MIXED: 100.5 * (1 - MIN_GAIN)}
    assert fastest(PLAIN, estimate(small, small, None)) == PLAIN
