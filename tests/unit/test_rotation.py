"""Which share of what repeats itself a commit takes (`--rotate`)."""

import hashlib
from pathlib import Path

import pytest

from support.rotation import HEAD, chosen, commit_of, share

pytest_plugins = ["pytester"]
COMMITS = [hashlib.sha1(bytes([number])).hexdigest() for number in range(60)]
CASES = """
import pytest

@pytest.mark.rotates(3)
@pytest.mark.parametrize("case", range(6))
def test_some(case):
    pass

def test_always():
    pass
"""


@pytest.mark.parametrize(("one_in", "count"), [(1, 7), (2, 4), (3, 3), (7, 1), (9, 1)])
def test_a_share_is_one_in_so_many_and_keeps_the_order(one_in: int, count: int) -> None:
    for commit in COMMITS:
        found = share("abcdefg", one_in, "letters", commit)
        assert len(found) == count
        assert found == sorted(found)


def test_every_case_has_its_turn() -> None:
    assert {chosen("abcdefg", "letters", commit) for commit in COMMITS} == set("abcdefg")
    assert len({"".join(share("abcdefg", 2, what, COMMITS[0])) for what in "klmnop"}) > 1


def test_the_same_commit_takes_the_same() -> None:
    for commit in COMMITS:
        assert share("abcdefg", 2, "x", commit) == share("abcdefg", 2, "x", commit)


def test_commits() -> None:
    assert commit_of(COMMITS[0]) == COMMITS[0]
    assert len(commit_of(HEAD)) == 40
    with pytest.raises(pytest.UsageError, match="no such commit"):
        commit_of("no-such-commit")


@pytest.mark.parametrize(("arguments", "count"), [((), 7), (("--rotate", COMMITS[0]), 3)])
def test_only_rotate_leaves_cases_out(
    pytester: pytest.Pytester, arguments: tuple[str, ...], count: int
) -> None:
    pytester.makeconftest((Path(__file__).parents[1] / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = rotates(n): as the suite's\n")
    pytester.makepyfile(CASES)
    pytester.runpytest("-p", "no:xdist", *arguments).assert_outcomes(passed=count)
