"""Exchanges between GPUs through the host's memory; with too few GPUs, ranks share the first."""

from pathlib import Path

import pytest

from support.forked_ranks import start_program

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_arrives(ranks: int, tmp_path: Path) -> None:
    """Bit by bit, one after another and recorded, of every size."""
    program = Path(__file__).with_name("host_wire_ranks.py")
    start_program(program, ranks, tmp_path, within_s=100)
