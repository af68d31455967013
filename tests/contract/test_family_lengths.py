"""A family's own files are short: what families have in common is said once, beside their folders.

A file that outgrows its limit says something that another family says, too, or has a part that is a
module of its own, as a family's model patches are. Of the families with more than the first three
have, each has the length that it had; it may fall, not rise.
"""

import pytest

from support.paths import REPOSITORY
from tp_runtime.models import families

USUAL = (110, 190)  # lines of family.py and of forward.py
LIMITS = {
    "flux2": (121, 190),
    "krea2": (133, 241),
    "ltx2": (275, 296),
    "minimax_h3": (221, 263),
    "qwen_image_21": (110, 242),
    "wan": (335, 392),
}


@pytest.mark.parametrize("name", families())
def test_a_family_stays_short(name: str) -> None:
    folder = REPOSITORY / "tp_runtime" / "models" / name
    limits = zip(("family.py", "forward.py"), LIMITS.get(name, USUAL), strict=True)
    for file, limit in limits:
        assert len((folder / file).read_text().splitlines()) <= limit, file
