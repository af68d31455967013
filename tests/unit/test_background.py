"""What runs in the background when Python ends."""

import subprocess
import sys

import pytest

from tp_runtime.client import background

SCRIPT = """
import time, torch
from tp_runtime.client import background

def free(tensors):
    time.sleep({seconds})
    while tensors:
        tensors.pop()
    print("freed", flush=True)

background.AT_EXIT_S = {limit}
background.in_background(free, [torch.zeros(1) for _ in range(100_000)])
"""


@pytest.mark.parametrize(("seconds", "limit", "printed"), [(0.5, 60, "freed\n"), (600, 0.1, "")])
def test_python_waits_for_it_for_a_while(seconds: float, limit: float, printed: str) -> None:
    script = SCRIPT.format(seconds=seconds, limit=limit)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=400
    )
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_what_it_is_given() -> None:
    found: list[tuple[int, ...]] = []
    background.in_background(lambda *args: found.append(args), 1, 2)
    for thread in list(background._threads):
        thread.join(10)
    assert found == [(1, 2)]
