"""The process that ranks are forked from: shared, private, short-lived, and never a danger."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest
from process.conftest import PythonWith, assert_ended, cpu_group

from support.leaks import SERVER_MARK, is_marked
from support.waiting import wait_until
from support.workers import bound_s
from tp_runtime.client import GroupDiedError, GroupStartError, prepare_start
from tp_runtime.client.engine import Engine
from tp_runtime.client.group_state import State
from tp_runtime.client.launch import fork_client, local
from tp_runtime.wire.protocol import Report

pytestmark = [pytest.mark.process, pytest.mark.rotates(3)]

Groups = Callable[..., Engine]


@pytest.fixture(scope="module")
def shared(python_with: PythonWith) -> str:
    """A Python whose fork server the tests leave as it is."""
    return python_with()


@pytest.fixture
def started() -> Iterator[Groups]:
    """`started(python, tp_size)`: the engine of a group that is up; closed after the test."""
    engines: list[Engine] = []

    def start(python: str, tp_size: int = 1) -> Engine:
        engine = Engine(cpu_group(tp_size, python=python))
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        engine.close()


def servers(python: str) -> list[psutil.Process]:
    """The live fork servers of this process that run that Python (a script's name).

    One that has just been started has no command line for a moment: the kernel closes what is
    closed on exec, which `Popen` waits for, before it puts the new command line in place.
    """
    children = psutil.Process().children()
    for child in children:
        wait_until(partial(_shows_what_it_runs, child))
    return [child for child in children if is_marked(child, python)]


def _shows_what_it_runs(child: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not is_marked(child, "") or bool(child.cmdline())
    return True


def works(engine: Engine) -> bool:
    return len(engine.call(Report)) == engine.config.tp_size


def test_all_groups_share_one(shared: str, started: Groups) -> None:
    python = shared
    with ThreadPoolExecutor(3) as pool:
        engines = list(pool.map(lambda size: started(python, size), [1, 2, 1]))
    (server,) = servers(python)
    ranks = [rank.pid for engine in engines for rank in engine.ranks]
    assert {child.pid for child in server.children()} == set(ranks)
    engines[0].close()
    assert all(works(engine) for engine in engines[1:])
    assert started(python).is_up()
    assert servers(python) == [server]


def test_ranks_are_named_for_a_person(shared: str, started: Groups) -> None:
    python = shared
    engine = started(python, 2)
    for rank in engine.ranks:
        name = f"tp_runtime.rank.worker: rank {rank.index} of 2 in {rank.log_path.parent}"
        assert psutil.Process(rank.pid).cmdline()[0] == name
    (server,) = servers(python)
    assert SERVER_MARK in " ".join(server.cmdline())


def test_ranks_give_way_to_comfyui(shared: str, started: Groups) -> None:
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + 5
    for rank in started(shared, 2).ranks:
        assert psutil.Process(rank.pid).nice() == niceness
        own_group = Path(f"/proc/{rank.pid}/autogroup")
        assert not own_group.exists() or own_group.read_text().endswith("nice 5\n")


def test_it_computes_nothing_and_holds_nothing_of_a_group(shared: str, started: Groups) -> None:
    python = shared
    engine = started(python, 2)
    (server,) = servers(python)
    assert server.num_threads() == 1
    engine.close()
    deadline = time.monotonic() + bound_s(5)
    while server.num_fds() > len(["stdin", "stdout", "stderr", "requests"]):
        assert time.monotonic() < deadline, server.open_files()
        time.sleep(0.02)


def test_it_is_killed(python_with: PythonWith, started: Groups) -> None:
    """Its groups fail at once, and say why; the next one has a new server."""
    python = python_with()
    engine = started(python, 2)
    (server,) = servers(python)
    began = time.monotonic()
    os.kill(server.pid, signal.SIGKILL)
    while engine.state is not State.FAILED:
        assert time.monotonic() - began < bound_s(2)
        time.sleep(0.01)
    assert isinstance(engine.error, GroupDiedError)
    words = f"ended with its fork server (process {server.pid}), which was killed by signal 9"
    assert words in str(engine.error)
    assert_ended([rank.pid for rank in engine.ranks], within_s=bound_s(1))
    assert works(started(python, 2))
    assert server not in servers(python)


def test_a_rank_dies_while_it_is_busy(
    python_with: PythonWith, started: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says late how that rank has ended; the other groups' ranks go on."""
    monkeypatch.setattr(local, "STATUS_TIMEOUT_S", 0.2)
    python = python_with()
    engine, other = started(python, 2), started(python)
    (server,) = servers(python)
    server.suspend()
    os.kill(engine.ranks[0].pid, signal.SIGKILL)
    wait_until(lambda: engine.state is State.FAILED)
    server.resume()
    assert f"Rank 0 (process {engine.ranks[0].pid}) ended" in str(engine.error)
    assert works(other)
    assert servers(python) == [server]
    assert works(started(python))


LEAVES_ONCE = """
import atexit, time
from pathlib import Path
file = Path({file!r})
if not file.exists():
    file.touch()
    fork_server.IDLE_S = 0.1
    atexit.register(time.sleep, 600)
"""


def test_one_that_was_prepared_ends_as_a_group_starts(
    python_with: PythonWith, started: Groups, tmp_path: Path
) -> None:
    """It was idle for long, and listens no more, but lives on for a moment."""
    python = python_with(while_importing=LEAVES_ONCE.format(file=str(tmp_path / "left")))
    prepare_start(python)
    (server,) = servers(python)
    wait_until(lambda: server.num_fds() <= len(["stdin", "stdout", "stderr"]), within_s=120)
    assert works(started(python))
    assert server not in servers(python)


def test_it_is_killed_while_a_group_starts(python_with: PythonWith) -> None:
    python = python_with("import time; time.sleep(600)")
    engine = Engine(cpu_group(2, python=python))

    def kill() -> None:
        for server in servers(python) if engine.ranks else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                server.kill()

    with pytest.raises(GroupStartError, match="ended with its fork server"):
        engine.start(kill)
    assert_ended([rank.pid for rank in engine.ranks], within_s=bound_s(1))


def test_it_ends_when_it_is_idle(python_with: PythonWith, started: Groups) -> None:
    """A rank keeps it; the next group has a new one."""
    python = python_with(while_importing="fork_server.IDLE_S = 3.0")
    engine = started(python)
    (server,) = servers(python)
    time.sleep(4)
    assert servers(python) == [server]
    engine.close()
    assert_ended([server.pid], within_s=bound_s(5))
    assert works(started(python))


def test_it_is_prepared_before_a_group_needs_it(python_with: PythonWith, started: Groups) -> None:
    python = python_with()
    prepare_start(python)
    (server,) = servers(python)
    assert started(python).is_up()
    assert servers(python) == [server]


def test_one_that_is_kept_does_not_end_when_it_is_idle(
    python_with: PythonWith, started: Groups
) -> None:
    python = python_with(while_importing="fork_server.IDLE_S = 0.1")
    prepare_start(python, keep=True)
    (server,) = servers(python)
    started(python).close()
    time.sleep(0.5)
    assert servers(python) == [server]
    assert works(started(python))


def assert_a_rank_may_end(python: str, started: Groups, says: str) -> None:
    """It is told as `says`; the server and its other groups go on."""
    first, second = started(python), started(python, 2)
    (rank,) = first.ranks
    os.kill(rank.pid, signal.SIGKILL)
    wait_until(lambda: first.state is State.FAILED)
    assert re.search(says, str(first.error))
    third = started(python)
    assert works(second)
    assert {one.ranks[0].server.pid for one in (first, second, third)} == {rank.server.pid}


def test_the_end_of_a_child_is_ignored_where_it_was_started(
    python_with: PythonWith, started: Groups, tmp_path: Path
) -> None:
    """As by a wrapper around ComfyUI: what it becomes, and what that starts, ignores it, too."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/bash\ntrap '' CHLD\nexec '{python_with()}' \"$@\"\n")
    python.chmod(0o700)
    assert_a_rank_may_end(str(python), started, "was killed by signal 9")


def test_a_package_has_the_kernel_reap_its_children(
    python_with: PythonWith, started: Groups
) -> None:
    ignore = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    assert_a_rank_may_end(python_with(while_importing=ignore), started, "ended")


# Such as scikit-learn where transformers finds it.
NEEDS_WHAT_IS_LEFT_OUT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers.models.transformers":
            import torchvision
sys.meta_path.insert(0, Finder())
"""


def test_a_package_that_needs_what_is_left_out_gets_it(
    python_with: PythonWith, started: Groups
) -> None:
    """The imports begin again, in the same process."""
    check = "import sys; assert sys.modules['torchvision']"
    python = python_with(check, while_importing=NEEDS_WHAT_IS_LEFT_OUT, light=False)
    assert works(started(python))
    assert len(servers(python)) == 1


def test_preparing_leaves_errors_to_the_start() -> None:
    nowhere = "/nowhere/python"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TP_RUNTIME_LOG_LEVEL", "loud")
        prepare_start(nowhere)
    prepare_start(nowhere)
    with pytest.raises(GroupStartError, match=nowhere):
        Engine(cpu_group(1, python=nowhere)).start()


def test_ranks_have_the_environment_of_their_start(
    python_with: PythonWith, started: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What packages read while they are imported needs another server."""
    python = python_with("import os; print('SEEN', os.environ.get('MY_OPTION'), flush=True)")
    seen = []
    for value in ("one", "two", None):
        if value is None:
            monkeypatch.delenv("MY_OPTION")
        else:
            monkeypatch.setenv("MY_OPTION", value)
        seen += started(python).ranks[0].log_path.read_text().split()[:2]
    assert seen == ["SEEN", "one", "SEEN", "two", "SEEN", "None"]
    assert len(servers(python)) == 1
    monkeypatch.setenv("VLLM_MY_OPTION", "three")
    started(python)
    assert len(servers(python)) == 2


def test_a_forked_process_has_none(shared: str, started: Groups) -> None:
    """It would share the socket of its parent's."""
    python = shared
    (rank,) = started(python).ranks
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            engine = Engine(cpu_group(1, python=python))
            engine.start()
            status = int(psutil.Process(engine.ranks[0].pid).ppid() == os.getppid())
            engine.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert psutil.Process(rank.pid).is_running()


def test_a_rank_cannot_be_forked(python_with: PythonWith, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_client, "EXIT_TIMEOUT_S", 30.0)  # it prints a traceback before
    python = python_with(while_importing="import os; os.fork = None")
    with pytest.raises(GroupStartError, match="the fork server exited with status 1"):
        Engine(cpu_group(2, python=python)).start()


def test_there_is_no_room_for_another_process(python_with: PythonWith, started: Groups) -> None:
    """The groups that run are as before."""
    python = python_with(
        while_importing="""
import errno, os

room, fork = iter([True, False, True]), os.fork

def fork_if_there_is_room():
    if next(room):
        return fork()
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

os.fork = fork_if_there_is_room
"""
    )
    first = started(python)
    with pytest.raises(GroupStartError, match=r"could not fork: .*temporarily unavailable"):
        started(python)
    assert works(first)
    assert works(started(python))
    assert len(servers(python)) == 1
