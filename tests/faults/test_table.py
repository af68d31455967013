"""The page says what is tested, and that is enough."""

import pytest
from faults.cases import CASES, INJECTED, PHASES, rows_of_page


def test_the_page_lists_exactly_the_faults_that_are_tested(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("write_reliability", default=False):
        pytest.skip("it is being written")
    assert rows_of_page() == [(c.phase, c.fault, c.result, f"{c.bound_s:g}") for c in CASES]


def test_every_phase_has_its_faults() -> None:
    assert {case.phase for case in INJECTED} == set(PHASES)
    assert len({(case.phase, case.fault) for case in CASES}) == len(CASES) >= 25
