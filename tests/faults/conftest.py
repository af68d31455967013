"""Groups for faults, and the table of what the faults came to.

`pytest tests/faults --write-reliability` writes what it saw into `docs/reliability.md`.
"""

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from faults.cases import CASES, Case, write_table
from process.conftest import home, python_with

from support.workers import stalled_s
from tp_runtime.fault_points import Fault

__all__ = ["home", "python_with"]

Observe = Callable[[Case, float], None]
_observed: dict[Case, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-reliability", action="store_true", help="write docs/reliability.md")


@pytest.fixture(scope="session")
def observe() -> Observe:
    """`observe(case, seconds)`: the fault was over after so long, and that is within its bound."""

    def note(case: Case, seconds: float) -> None:
        print(f"{case.phase}, {case.fault}: {seconds:.2f} s")
        _observed[case] = seconds
        assert 0 <= seconds <= stalled_s(case.bound_s)

    return note


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("write_reliability", default=False):
        return
    missing = set(CASES) - set(_observed)
    if missing or session.testsfailed:
        raise pytest.UsageError(f"the table is not written: {len(missing)} faults were not seen")
    write_table(_observed, datetime.now(timezone.utc).date())


@pytest.fixture(scope="module")
def faults(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file in which the ranks of this module's groups look for faults."""
    file = tmp_path_factory.mktemp("faults") / "fault"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_TEST_FAULTS", str(file))
        yield file


def put(faults: Path, **fault: Any) -> None:
    """Have a fault happen; all of it is there at once."""
    new = faults.with_suffix(".new")
    new.write_bytes(msgspec.json.encode(Fault(**fault)))
    new.rename(faults)
