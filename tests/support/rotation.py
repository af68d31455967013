"""Which rows of the compatibility suite `make test` runs on one model only, and on which.

A row with the same workflow and the same expectation on every model runs on one of them, which the
commit's hash chooses: from commit to commit it comes to all of them. `make test-all` (`--all-rows`)
runs every row on every model that it is for, `--rows-of COMMIT` what ran at another commit.
"""

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import TypeVar

from support.compatibility import FAMILIES, Family, Row
from support.compatibility_rows import ROWS
from support.paths import REPOSITORY

ALL = "all"
NO_COMMIT = "0" * 40  # where there is no git, or no repository

Item = TypeVar("Item")


def this_commit() -> str:
    """The hash of the commit that is checked out."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--verify", "HEAD^{commit}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return NO_COMMIT
    return done.stdout.strip()


def chosen(items: Sequence[Item], what: str, commit: str) -> Item:
    """The one of the items that a commit takes for `what`."""
    digest = hashlib.sha256(f"{commit} {what}".encode()).digest()
    return items[int.from_bytes(digest[:8], "big") % len(items)]


def rotates(row: Row) -> bool:
    """Whether one model stands for all.

    A row whose workflow differs (a third of the samplers with each model, say) runs on all of them.
    """
    workflows = {tuple(sorted(row.prompt(family))) for family in FAMILIES}
    return not isinstance(row.expect, Mapping) and len(workflows) == 1


def cases(rows_of: str) -> list[tuple[Family, Row]]:
    """The rows to run at a commit, each with its model; `ALL`: every row on every model."""
    return [
        (family, row)
        for family in FAMILIES
        for row in ROWS
        if row.expected(family)
        if rows_of == ALL or not rotates(row) or chosen(FAMILIES, row.name, rows_of) is family
    ]
