"""Groups of real rank processes, and a Python for them that a test can put a fault into."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import psutil
import pytest
import torch

from support.leaks import Footprint, fork_servers, is_marked, worker_processes
from support.workers import bound_s
from tp_runtime.client.evaluation_times import EvaluationTimes
from tp_runtime.client.launch.local import LocalLauncher
from tp_runtime.config import GroupConfig

TESTS = Path(__file__).resolve().parents[1]
BEFORE = Footprint.now()  # the files of the temporary folder are another's then: `own_home`

PythonWith = Callable[..., str]


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own for the groups of a module; no rank of them outlives the module."""
    # A space: torch takes the path of the rendezvous file as it is written.
    folder = tmp_path_factory.mktemp("the home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_HOME", str(folder))
        yield folder
        assert_nothing_left(folder)


# What stands in for a Python that the fork server is started with.
SCRIPT = """\
#!{python}
import sys

sys.path.append({tests!r})
sys.argv = sys.argv[2:]
exec(sys.argv[0].rpartition("runpy.run_module(")[0])  # all but running the server
sys.argv[0] = __file__  # which the server's title says

from process import light_rank
from tp_runtime.rank import fork_server, imports

import_all = imports.import_all

def import_some(lean):
{while_importing}
    light_rank.be_light() if {light} else import_all(lean=lean)
    from tp_runtime.rank import worker

    be_rank = worker.run

    def run(config, parent_pid):
{in_rank}
        be_rank(config, parent_pid)

    worker.run = run

imports.import_all = import_some
fork_server.main()
"""


@pytest.fixture(scope="module")
def python_with(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonWith]:
    """`python_with(code)`: a Python for the ranks that runs `code` at the start of each.

    The code finds what the rank is told in `config`. With `light`, the rank is one that computes
    nothing (see `light_rank`). `while_importing` is run once, by the fork server.
    """
    scripts: list[str] = []

    def make(code: str = "", *, while_importing: str = "", light: bool = True) -> str:
        script = tmp_path_factory.mktemp("python") / "python"
        script.write_text(
            SCRIPT.format(
                python=sys.executable,
                tests=str(TESTS),
                light=light,
                while_importing=indent(while_importing, " " * 4),
                in_rank=indent(code, " " * 8),
            )
        )
        script.chmod(0o700)
        scripts.append(str(script))
        return str(script)

    yield make
    for child in psutil.Process().children():
        if any(is_marked(child, script) for script in scripts):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()  # a fork server that waits for the next group


def prepare(config: GroupConfig) -> None:
    """Have what the ranks of such groups are forked from up: it imports for a while."""
    launcher = LocalLauncher()
    launcher.prepare(config, lambda: None)
    launcher.clean_up(keep_logs=False)


@contextlib.contextmanager
def evaluations_may_take(timeout_s: float) -> Iterator[None]:
    """So long, if they are asked for meanwhile; loads may take what the group lets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvaluationTimes, "timeout_s", lambda *_: timeout_s)
        yield


def ranks_of(home: Path) -> set[int]:
    """The live ranks of groups below `home`; other tests may run on the machine."""
    return {process.pid for process in worker_processes() if is_marked(process, str(home))}


def assert_nothing_left(home: Path, within_s: float = bound_s(5)) -> None:
    """Soon there is no rank of a group below `home`, and nothing of ours with a name.

    Nor is there a fork server whose engine has ended; the others wait for the next group.
    """
    deadline = time.monotonic() + within_s
    while left := [
        *ranks_of(home),
        *fork_servers(),
        *(added := Footprint.now().added_since(BEFORE)).shared_memory,
        *added.temporary,
    ]:
        assert time.monotonic() < deadline, f"left over after {within_s} s: {left}"
        time.sleep(0.05)


def cpu_group(tp_size: int = 2, **settings: Any) -> GroupConfig:
    """Settings of a group of CPU ranks, with bounds that a test can wait for."""
    return GroupConfig(
        tp_size, "cpu", **{"start_timeout_s": 120.0, "call_timeout_s": 60.0, **settings}
    )


def make_inputs(
    height: int = 16, *, width: int | None = None, seed: int = 0, caption_width: int = 64
) -> dict[str, Any]:
    """What ComfyUI passes to a Z-Image transformer, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(1, 16, height, width or height, generator=generator),
        "timesteps": torch.rand(1, generator=generator),
        "context": torch.randn(1, 20, caption_width, generator=generator),
        "num_tokens": 20,
        "transformer_options": {},
    }


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be reaped.

    With all its threads: the first may be a zombie while another still holds what all share.
    """
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)


def assert_ended(pids: list[int], within_s: float) -> None:
    """Every one of the processes is gone in time."""
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if not has_ended(pid)]:
        assert time.monotonic() < deadline, f"still there after {within_s} s: {left}"
        time.sleep(0.02)
