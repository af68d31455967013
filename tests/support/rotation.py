"""What `make test` leaves out of what repeats itself, by commit.

`make test` is `pytest --rotate HEAD`: of tests that are marked `rotates(n)` it runs one case in n,
and a compatibility row with the same workflow and the same expectation on every model it runs on
one of them. The commit's hash chooses which, so from commit to commit it comes to all of them.
Without `--rotate` (`make test-all`, and any plain `pytest`) everything runs.
"""

import hashlib
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

import pytest

from support.compatibility import FAMILIES, NEWER, Family, Row
from support.compatibility_rows import ROWS
from support.paths import REPOSITORY

HEAD = "HEAD"
NO_COMMIT = "0" * 40  # where there is no git, or no repository

Item = TypeVar("Item")


def commit_of(name: str) -> str:
    """The hash of a commit; of `HEAD` where there is none, `NO_COMMIT`.

    Raises:
        pytest.UsageError: git knows no such commit.
    """
    if re.fullmatch("[0-9a-f]{40}", name):
        return name
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--verify", f"{name}^{{commit}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        if name == HEAD:
            return NO_COMMIT
        raise pytest.UsageError(f"--rotate {name}: git knows no such commit") from error
    return done.stdout.strip()


def share(items: Sequence[Item], one_in: int, what: str, commit: str) -> list[Item]:
    """The items that a commit takes for `what`: one in so many, at least one, in their order."""

    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{commit} {what} {index}".encode()).digest()

    count = -(-len(items) // one_in)
    return [items[index] for index in sorted(sorted(range(len(items)), key=rank)[:count])]


def chosen(items: Sequence[Item], what: str, commit: str) -> Item:
    """The one of the items that a commit takes for `what`."""
    (item,) = share(items, len(items), what, commit)
    return item


def left_out(tests: Sequence[pytest.Item], commit: str) -> set[pytest.Item]:
    """Of tests marked `rotates(n)`, those whose turn is at other commits.

    On a function the mark is about its cases, on a module about its tests, and with a name,
    `rotates(n, name)`, about the modules that have it; the nearer mark counts.
    """
    # What it is about → its members: a case, a test, or all tests of a module.
    groups: dict[tuple[str, int], dict[str, list[pytest.Item]]]
    groups = defaultdict(lambda: defaultdict(list))
    for test in tests:
        for node, mark in test.iter_markers_with_node("rotates"):
            one_in, *name = mark.args
            of = test.nodeid.partition("[")[0] if node is test else node.nodeid
            member = node.nodeid if name else test.nodeid
            groups[name[0] if name else of, one_in][member].append(test)
            break
    found: set[pytest.Item] = set()
    for (of, one_in), members in groups.items():
        for name in members.keys() - set(share(list(members), one_in, of, commit)):
            found.update(members[name])
    return found


def rotates(row: Row) -> bool:
    """Whether one model stands for all.

    A row whose workflow differs (each model its share of the samplers, say) runs on all of them.
    """
    workflows = {tuple(sorted(row.prompt(family))) for family in FAMILIES}
    alike = not isinstance(row.expect, Mapping) and not isinstance(row.newer, Mapping)
    return alike and len(workflows) == 1


def cases(commit: str | None) -> list[tuple[Family, Row]]:
    """The rows to run at a commit, each with its model; `None`: every row on every model."""
    return [
        (family, row)
        for family in FAMILIES
        for row in ROWS
        if row.expected(family, NEWER)
        if commit is None or not rotates(row) or chosen(FAMILIES, row.name, commit) is family
    ]
