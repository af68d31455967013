"""How much a fuzzer tries: in CI a fixed number of fixed examples, in `make soak` many random ones.

`make soak` sets `SOAK_MINUTES`.
"""

import os
from typing import Any

from hypothesis import settings

SOAKING = "SOAK_MINUTES" in os.environ
MANY = 40  # times as many examples


def examples(number: int, **more: Any) -> settings:
    """A decorator for a hypothesis test: so many examples, the same in each run of CI.

    `more`: other settings of hypothesis.
    """
    return settings(
        max_examples=number * MANY if SOAKING else number,
        derandomize=not SOAKING,
        database=None,
        **more,
    )
