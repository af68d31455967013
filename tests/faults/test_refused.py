"""What the system refuses: the person learns what, and what to do; and no rank lives on."""

import errno
import gc
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.cases import case
from faults.conftest import Observe
from process.conftest import TESTS, PythonWith, assert_ended, cpu_group, prepare, ranks_of

from support.paths import REPOSITORY
from support.sandbox import PIDFD_OPEN, PIDFD_SEND_SIGNAL
from support.workers import bound_s
from tp_runtime import reasons
from tp_runtime.client import GroupStartError, TPRuntimeError, examine
from tp_runtime.client.engine import Engine
from tp_runtime.client.launch import fork_client, launcher, local

pytestmark = pytest.mark.process


MessageOf = Callable[..., str]


@pytest.fixture(scope="module")
def python(python_with: PythonWith) -> str:
    return python_with()


@pytest.fixture
def message_of(observe: Observe) -> MessageOf:
    """`message_of(engine, fault)`: of the error that the start ends in; no process is left."""

    def start(engine: Engine, fault: str = "") -> str:
        began = time.monotonic()
        with pytest.raises(GroupStartError) as caught:
            engine.start()
        if fault:
            observe(case("start", fault), time.monotonic() - began)
        assert_ended([rank.pid for rank in engine.ranks], within_s=0)
        return str(caught.value)

    return start


def with_fork_server(python: str) -> Engine:
    """A group of one rank, to be started from a fork server that is up."""
    config = cpu_group(1, python=python)
    prepare(config)
    return Engine(config)


# --- a sandbox -----------------------------------------------------------------------------------

IN_A_SANDBOX = """
import sys, time
import psutil
sys.path[:0] = {paths!r}
from process.conftest import cpu_group
from support.sandbox import refuse
from tp_runtime.client.engine import Engine

refuse({error}, *{calls})
began = time.monotonic()
engine = Engine(cpu_group(2, python={python!r}))
try:
    engine.start()
    began = time.monotonic()
    processes = [psutil.Process(rank.pid) for rank in engine.ranks]
    engine.ranks[0].kill()  # and then the group ends the other
    assert not psutil.wait_procs(processes, 10)[1]
finally:
    print(time.monotonic() - began, *[rank.pid for rank in engine.ranks], flush=True)
    engine.close()
"""


def run_in_a_sandbox(python: str, error: int, *calls: int) -> subprocess.CompletedProcess[str]:
    code = IN_A_SANDBOX.format(
        paths=[str(REPOSITORY), str(TESTS)], error=error, calls=calls, python=python
    )
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOSYS])
def test_a_sandbox_refuses_to_have_processes_watched(
    python: str, error: int, home: Path, observe: Observe
) -> None:
    done = run_in_a_sandbox(python, error, PIDFD_OPEN, PIDFD_SEND_SIGNAL)
    observe(case("start", "a sandbox refuses pidfd_open"), float(done.stdout))
    last = done.stderr.splitlines()[-1]
    assert f"needs the system call pidfd_open ({os.strerror(error)}). A sandbox" in last
    assert not ranks_of(home)


def test_a_sandbox_refuses_signals_by_pidfd(python: str, home: Path, observe: Observe) -> None:
    """The ranks are ended by their numbers."""
    done = run_in_a_sandbox(python, errno.EPERM, PIDFD_SEND_SIGNAL)
    assert done.returncode == 0, done.stderr
    took_s, *pids = done.stdout.split()
    observe(case("idle", "a sandbox refuses pidfd_send_signal"), float(took_s))
    assert_ended(list(map(int, pids)), within_s=0)
    assert not ranks_of(home)


def test_a_sandbox_around_the_fork_server_alone(
    python_with: PythonWith, home: Path, message_of: MessageOf
) -> None:
    refuse = f"from support.sandbox import refuse; refuse(1, {PIDFD_OPEN})"
    engine = with_fork_server(python_with(while_importing=refuse))
    message = message_of(engine, "a sandbox refuses pidfd_open to the ranks")
    assert "could not fork: [Errno 1] Operation not permitted. A sandbox" in message
    assert not ranks_of(home)


def test_doctor_fails_where_a_start_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no(*_: object) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "pidfd_open", no)
    full = tmp_path / "no folder"
    full.touch()
    monkeypatch.setenv("TP_RUNTIME_HOME", str(full))
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = {"python": "3.11.0", "packages": {}}
    monkeypatch.setattr("tp_runtime.tools.doctor._probe", lambda _: probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(open_files()) + 30, hard))
    try:
        found = {check.name: check for check in examine() if check.status == "failed"}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
    assert found.keys() == {"System calls", "Limits", "Log folder"}
    assert "pidfd_open (Operation not permitted)" in found["System calls"].text
    assert "ulimit -n" in found["Limits"].advice
    assert "TP_RUNTIME_HOME" in found["Log folder"].advice


# --- limits --------------------------------------------------------------------------------------


def open_files() -> set[int]:
    return {int(fd.name) for fd in Path("/proc/self/fd").iterdir()}


def test_few_files_may_be_open(python: str, observe: Observe) -> None:
    """However few: the group works, or the error says which limit it is."""
    engine = Engine(cpu_group(2, python=python))
    engine.start()  # so that the fork server is up
    engine.close()
    gc.collect()  # what groups of other tests held
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = open_files()
    unused = [fd for fd in range(2000) if fd not in in_use]
    outcomes: list[str] = []
    while "works" not in outcomes:
        count = len(outcomes)
        began = time.monotonic()
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused[count], hard))
        try:
            engine = Engine(cpu_group(2, python=python))
            engine.start()
            outcomes.append("works")
            engine.close()
        except TPRuntimeError as error:
            outcomes.append(str(error))
            observe(case("start", "few files may be open"), time.monotonic() - began)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, hard))
        assert_ended([rank.pid for rank in engine.ranks], within_s=bound_s(5))
    # Fork servers of other tests may have ended meanwhile.
    assert open_files() <= in_use, "what does not start leaves no file open"
    assert len(outcomes) > 5
    assert [text for text in outcomes if text != "works" and "ulimit -n" not in text] == []


def test_ranks_may_have_few_files_open(python_with: PythonWith, message_of: MessageOf) -> None:
    few = "import os, resource; n = len(os.listdir('/proc/self/fd')) + 2; "
    few += "resource.setrlimit(resource.RLIMIT_NOFILE, (n, n))"
    engine = with_fork_server(python_with(while_importing=few))
    assert "ulimit -n" in message_of(engine, "the fork server may open few files")


def test_the_address_space_of_ranks_is_small(
    python_with: PythonWith, message_of: MessageOf
) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28))"
    engine = with_fork_server(python_with(few))
    assert "ulimit" in message_of(engine, "the address space of the ranks is small")


def test_no_thread_can_be_started(
    python: str, monkeypatch: pytest.MonkeyPatch, message_of: MessageOf
) -> None:
    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("tp-runtime"):
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for config in (cpu_group(1, python=python), cpu_group(1, python=f"{python}-another")):
        message = message_of(Engine(config), "no thread can be started")
        assert "can't start new thread. Raise the limit of processes and threads" in message


def test_the_state_folder_is_read_only(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message_of: MessageOf
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setenv("TP_RUNTIME_HOME", str(tmp_path))
    message = message_of(Engine(cpu_group(1, python=python)), "the state folder is read-only")
    assert f"Read-only file system). {reasons.STATE_FOLDER}" in message


# --- processes that end without a word -----------------------------------------------------------


def test_a_fork_server_ends_with_an_unread_request(python: str, observe: Observe) -> None:
    """Its socket is reset then, and not just closed."""
    server = fork_client.ForkServer(python, local._server_environment())
    server.wait_until_up(lambda: None, timeout_s=120)
    os.kill(server.pid, 19)
    unread = server._ask(None)
    server.kill()
    server._process.wait()
    began = time.monotonic()
    with pytest.raises(fork_client.ForkServerError, match="was killed by signal 9"):
        server._ask(None)
    observe(case("start", "the fork server ends with a request unread"), time.monotonic() - began)
    unread.close()


def test_what_a_rank_raises_before_it_is_one_is_in_its_log(
    python_with: PythonWith, message_of: MessageOf
) -> None:
    broken = "fork_server._give_way = lambda: 1 / 0"
    message = message_of(Engine(cpu_group(1, python=python_with(while_importing=broken))))
    assert message.endswith("ZeroDivisionError: division by zero")


def test_the_driver_for_ray_ends_with_a_reason(tmp_path: Path, message_of: MessageOf) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No space left on device >&2; exit 3\n")
    python.chmod(0o700)
    config = cpu_group(1, where="ray", ray_address="127.0.0.1:1", python=str(python))
    message = message_of(Engine(config))
    assert "The driver process for Ray exited with status 3." in message
    assert "TP_RUNTIME_HOME" in message
    assert message.endswith("No space left on device")


@pytest.mark.parametrize("refused", ["socket.socketpair", "tempfile.mkdtemp"])
def test_a_limit_is_met_before_the_driver_for_ray(
    monkeypatch: pytest.MonkeyPatch, message_of: MessageOf, refused: str
) -> None:
    def refuse(*_: object, **options: object) -> str:
        if str(options.get("prefix", "")).startswith("tp-ray") or "pair" in refused:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return mkdtemp(**options)  # type: ignore[call-overload,no-any-return]

    mkdtemp = tempfile.mkdtemp
    engine = Engine(cpu_group(1, where="ray", python=sys.executable))
    monkeypatch.setattr(refused, refuse)
    assert "on Ray could not be started: [Errno 24] Too many" in message_of(engine)


def test_a_log_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert "No such file" in launcher.tail_of_file(tmp_path / "rank0.log")
    assert "Is a directory" in launcher.tail_of_file(tmp_path)
    (tmp_path / "empty").touch()
    assert launcher.tail_of_file(tmp_path / "empty") == "(It is empty.)"
