"""The words for what the system refused are the same wherever it does."""

import errno
import os
import signal

import pytest

from tp_runtime import reasons
from tp_runtime.client import GroupConfig, TPRuntimeError
from tp_runtime.client.failures import no_fork_server, no_python

LIMITS = {
    errno.EMFILE: "limit of open files",
    errno.ENFILE: "limit of open files",
    errno.EAGAIN: "limit of processes and threads",
    errno.ENOMEM: "the address space",
    errno.ENOSPC: "TP_RUNTIME_HOME",
    errno.EDQUOT: "TP_RUNTIME_HOME",
    errno.EROFS: "TP_RUNTIME_HOME",
    errno.EFBIG: "size of files",
    errno.ENOSYS: "sandbox",
    errno.EPERM: "sandbox",
}


@pytest.mark.parametrize("number", LIMITS)
def test_the_engine_and_a_rank_say_the_same(number: int) -> None:
    error = OSError(number, os.strerror(number))
    what_to_do = reasons.advice(str(error))
    assert LIMITS[number] in what_to_do
    assert reasons.of(error) == f"{error}. {what_to_do}"
    config = GroupConfig(2, "cpu", python="/some/python")
    assert str(no_python(config, error)).endswith(what_to_do), "and not: use another Python"
    log = f"Traceback\nOSError: {error}\n"
    assert what_to_do in str(no_fork_server(config, RuntimeError("exited with status 1"), log))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("RuntimeError: can't start new thread", "processes and threads"),
        ("libgomp: Thread creation failed: Resource temporarily unavailable", "processes"),
        ("ImportError: libtorch_cuda.so: failed to map segment from shared object", "ulimit -v"),
        ("No usable temporary directory found in ['/tmp', '/var/tmp']", "TMPDIR"),
        ("creating shared memory segment /dev/shm/nccl-1: No space left on device", "--shm-size"),
    ],
)
def test_what_libraries_say(text: str, word: str) -> None:
    assert word in reasons.advice(text)


def test_another_error_has_no_advice() -> None:
    assert reasons.advice("ValueError: no such device") == ""
    assert reasons.of(ValueError("no such device.")) == "no such device."
    assert reasons.of(KeyError()) == "KeyError."


def test_every_end_of_a_process_has_words() -> None:
    assert reasons.how_ended(3) == "exited with status 3"
    assert "the memory of the host or container" in reasons.how_ended(-signal.SIGKILL)
    assert "signal 31 (a sandbox" in reasons.how_ended(-signal.SIGSYS)
    assert "signal 11 (Segmentation fault)" in reasons.how_ended(-signal.SIGSEGV)
    assert "signal 34 (" in reasons.how_ended(-34), "one without a name"
    assert "status 137, as a shell says that it was killed" in reasons.how_ended(137)


def test_a_message_can_be_shown() -> None:
    path = os.fsdecode(b"/h\xff\xc3\xa9")
    assert str(TPRuntimeError(f"The folder {path}.")) == "The folder /h\\udcffé."
