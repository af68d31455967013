"""A family's own files are short: what families have in common is said once, beside their folders.

A file of the first three that outgrows its limit says something that another family says, too, or
has a part that is a module of its own, as a family's model patches are.
"""

import pytest

from support.paths import REPOSITORY

LIMITS = {"family.py": 110, "forward.py": 190}
FAMILIES = ("flux", "qwen_image", "z_image")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("file", "limit"), LIMITS.items())
def test_a_family_stays_short(name: str, file: str, limit: int) -> None:
    lines = (REPOSITORY / "tp_runtime" / "models" / name / file).read_text().splitlines()
    assert len(lines) <= limit
