"""The demo's command line; `make demo` itself is the test of what it does."""

import subprocess
import sys

from support.paths import REPOSITORY


def test_an_unknown_model_is_one_line() -> None:
    command = [sys.executable, REPOSITORY / "scripts/demo.py", "--model", "sdxl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "MODEL=sdxl: choose one of z_image, flux, flux2, qwen_image, wan.\n"
