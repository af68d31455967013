"""Exchanges between GPUs through the host's memory; with too few GPUs, ranks share the first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import REPOSITORY

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_arrives(ranks: int, tmp_path: Path) -> None:
    """Bit by bit, one after another and recorded, of every size."""
    program = Path(__file__).with_name("host_wire_ranks.py")
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, program, str(ranks), tmp_path],
        env=os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        timeout=100,
        check=True,
    )
