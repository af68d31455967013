"""Makes a Python for the GPU processes in this pack's home, when a person asks for it.

vLLM pins one exact torch, so that its place is a virtual environment of its own. Nothing here runs
by itself: ComfyUI's registry forbids a pack to install packages without being asked.
"""

import atexit
import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from ..config import PACKAGE, home
from ..errors import InputError
from ..reasons import how_ended
from ..tools.doctor import OLDEST_PYTHON
from .launch.launcher import tail_of

REQUIREMENTS = tuple(
    PACKAGE.parent / name for name in ("requirements.txt", "requirements-runtime.txt")
)
NEEDED_BYTES = 14 * 2**30  # 9 for what it takes, 4 for pip's copies while it unpacks, and some room
# A cache would take four GiB more, for what is made once.
_PIP_OPTIONS = ("--no-input", "--no-cache-dir", "--progress-bar", "off")
_COMPLETE = "complete"  # a file in the folder, once all is installed
# The kernel ends pip with the thread that started it, whatever that is doing.
_WITH_THREAD = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])"""

State = Literal["absent", "making", "ready", "failed"]


@dataclass(frozen=True)
class Progress:
    """How it stands.

    ``line``: the command that runs, then what it has printed last; ``written_bytes``: what the disk
    has less of since it began; ``error``: why it failed, else empty.
    """

    state: State
    folder: str
    python: str
    commands: list[str]
    needed_bytes: int
    free_bytes: int
    line: str = ""
    seconds: float = 0.0
    written_bytes: int = 0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


class OwnPython:
    """A virtual environment that is made once. Thread-safe.

    Several ComfyUI servers may have one home, and so the same folder. Who makes or removes it has a
    lock beside it, and one that is complete is never touched: ranks of any of them may run in it.
    """

    def __init__(
        self, folder: Path | None = None, requirements: Sequence[Path] = REQUIREMENTS
    ) -> None:
        """``folder``: where; by default below the pack's home. Makes nothing."""
        self._folder = folder or home() / "python"
        files = [word for file in requirements for word in ("-r", str(file))]
        self._commands = [
            [sys.executable, "-m", "venv", "--clear", str(self._folder)],
            [self.python, "-m", "pip", "install", *_PIP_OPTIONS, *files],
        ]
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._cancelled = False
        self._began = 0.0
        self._free_before = 0
        self._error = ""
        self._log: BinaryIO | None = None  # of the last commands
        atexit.register(self.cancel)

    @property
    def python(self) -> str:
        """The path that it has, or will have."""
        return str(self._folder / "bin" / "python")

    @property
    def refusal(self) -> str:
        """Why this Python cannot make one; empty where it can."""
        if sys.version_info[:2] >= OLDEST_PYTHON:
            return ""
        here, oldest = (".".join(map(str, one[:2])) for one in (sys.version_info, OLDEST_PYTHON))
        return (
            f"ComfyUI's Python is {here}, that of the GPU processes has to be {oldest} or newer: "
            f"run the commands with such a python3 in the place of {sys.executable}, and name what "
            "they make in the setting 'Python of the GPU processes'."
        )

    def progress(self) -> Progress:
        """How it stands now. Never waits."""
        with self._lock:
            making = self._thread is not None and self._thread.is_alive()
            error = "" if making else self._error
            state: State = "making" if making else "failed" if error else "absent"
            if not making and (self._folder / _COMPLETE).exists():
                state, error = "ready", ""
            lines = tail_of(self._log).splitlines() if making and self._log else []
            free = _free_bytes(self._folder)
            return Progress(
                state,
                str(self._folder),
                self.python,
                [shlex.join(command) for command in self._commands],
                NEEDED_BYTES,
                free,
                line=lines[-1] if lines else "",
                seconds=round(time.monotonic() - self._began, 1) if making else 0.0,
                written_bytes=max(0, self._free_before - free) if making else 0,
                error=error,
            )

    def make(self) -> None:
        """Begin, in a thread. Nothing happens if that is under way, or if a complete one is there.

        Raises:
            InputError: there is no room on the disk, this Python is too old, or another process
                is making it.
        """
        if self.refusal:
            raise InputError(self.refusal)
        with self._lock, contextlib.ExitStack() as unless_begun:
            if self._thread is not None and self._thread.is_alive():
                return
            lock = unless_begun.enter_context(_locked_beside(self._folder))
            if (self._folder / _COMPLETE).exists():
                return
            free = _free_bytes(self._folder)
            if free < NEEDED_BYTES:
                raise InputError(
                    f"{self._folder} has {free / 2**30:.1f} GiB of free disk, and a Python for the "
                    f"GPU processes takes {NEEDED_BYTES / 2**30:.0f} while it is made. Free some, "
                    "or set TP_RUNTIME_HOME to a folder on another disk."
                )
            self._cancelled, self._error, self._began = False, "", time.monotonic()
            self._free_before = free
            # For appending, since it is read while it is written to.
            self._log = tempfile.TemporaryFile("a+b", dir=self._folder.parent)  # noqa: SIM115
            self._thread = threading.Thread(
                target=self._run, args=(lock,), name="tp-runtime-own-python", daemon=True
            )
            self._thread.start()
            unless_begun.pop_all()

    def cancel(self) -> None:
        """End what is under way, and remove what it has made. Returns when that is done."""
        with self._lock:
            self._cancelled, thread = True, self._thread
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        if thread is not None:
            thread.join()

    def _run(self, lock: IO[bytes]) -> None:
        """Thread: the commands, one after another; closes the lock afterwards."""
        with lock:
            error = next(filter(None, map(self._failure_of, self._commands)), "")
            if error or self._cancelled:
                shutil.rmtree(self._folder, ignore_errors=True)
            else:
                (self._folder / _COMPLETE).touch()
        with self._lock:
            self._error = "" if self._cancelled else error

    def _failure_of(self, command: list[str]) -> str:
        """Run a command; why it failed, or nothing."""
        with self._lock:
            if self._cancelled:
                return "It was cancelled."
            try:
                assert self._log is not None
                self._log.write(f"$ {shlex.join(command)}\n".encode())
                self._log.flush()
                process = self._process = subprocess.Popen(
                    [sys.executable, "-c", _WITH_THREAD, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={
                        **os.environ,
                        "PYTHONUNBUFFERED": "1",
                        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
                    },
                )
            except OSError as error:
                return f"{shlex.join(command)}: {error}"
        status = process.wait()
        with self._lock:
            self._process = None
        if status == 0:
            return ""
        ended = f"`{shlex.join(command)}` {how_ended(status)}."
        return f"{ended} Its output ends:\n{tail_of(self._log) if self._log else ''}"


def _locked_beside(folder: Path) -> IO[bytes]:
    """A file beside the folder, locked for this process until it is closed or the process ends.

    Raises:
        InputError: another process has the lock, or there can be no file.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(f"{folder.name}.lock"), "ab")  # noqa: SIM115  (the caller's)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error}. Set TP_RUNTIME_HOME.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise InputError(
            f"Another ComfyUI is making {folder}. Wait for it: then this one has it, too."
        ) from None
    except OSError:
        pass  # a file system without locks
    return lock


def _free_bytes(folder: Path) -> int:
    """Of the disk that the folder is on, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
