"""Processes that compute together without a runtime, each a rank of torch's own group (gloo).

A test starts a program (``start_program``), which calls ``run_ranks``. The ranks are forked, so
that what the program imports, such as vLLM, is imported once.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from support.paths import REPOSITORY


def start_program(program: Path, ranks: int, folder: Path, within_s: float) -> None:
    """Raises subprocess.CalledProcessError if a rank failed, TimeoutExpired if they took longer."""
    path = [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, program, str(ranks), folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "GLOO_SOCKET_IFNAME": "lo"},
        timeout=within_s,
        check=True,
    )


def run_ranks(compute: Callable[[int, int, Path], None]) -> None:
    """``compute(rank, size, folder)`` in each rank, of the program's arguments: RANKS FOLDER."""
    size, folder = int(sys.argv[1]), Path(sys.argv[2])
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            dist.init_process_group("gloo", f"file://{folder}/meet", world_size=size, rank=rank)
            compute(rank, size, folder)
            dist.barrier()
            dist.destroy_process_group()
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * size, codes
