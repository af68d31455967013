"""The pack's nodes as ComfyUI reads them, written out once: it has to import all of ComfyUI."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.paths import comfyui_path


@pytest.fixture(scope="session")
def dump() -> dict[str, Any]:
    """What dump_node_schemas.py prints."""
    program = Path(__file__).with_name("dump_node_schemas.py")
    command = [sys.executable, program, comfyui_path()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
