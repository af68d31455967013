"""Fork servers, seen from ComfyUI's process: starts them, asks them for ranks, ends them.

``rank/fork_server.py`` is the program. One server serves all groups of this process that have the
same Python and the same environment.
"""

import errno
import os
import socket
import subprocess
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future

import msgspec

from ... import reasons
from ...config import WorkerConfig
from ...wire.transport import receive_with_fds, wait
from ..poll import POLL_S, Poll
from .environment import COMPILE_CACHES, code_that_runs
from .launcher import tail_of

FORK_TIMEOUT_S = 30.0
EXIT_TIMEOUT_S = 1.0  # the process ends a moment after its connection
MAX_ANSWER_BYTES = 64

# PR_SET_PDEATHSIG: the kernel ends the server together with the thread that started it, whatever
# it is doing. Set before the imports, which take seconds; if that was too late, the socket's other
# end is closed.
_SERVER_CODE = f"""\
import ctypes, select, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
stream = select.poll()
stream.register(int(sys.argv[1]), select.POLLHUP)
stream.poll(0) and sys.exit()
{code_that_runs("tp_runtime.rank.fork_server")}"""

# What packages read of the environment while they are imported, so that it cannot be changed
# afterwards; everything else each rank gets as it is when its group starts.
_READ_BY_IMPORTS = ("CUDA_", "HF_", "LD_", "NCCL_", "OMP_", "PYTHON", "TORCH", "TRITON_", "VLLM_")


class ForkServerError(Exception):
    """The fork server has ended, or does not answer; the text says how."""


class ForkServer:
    """A fork server of this process. Thread-safe."""

    def __init__(self, python: str, environment: Mapping[str, str], keep: bool = False) -> None:
        """Start the process, which takes a while until it is up. Raises OSError.

        ``keep``: it does not end when it has had no rank for long.
        """
        self.started_at = time.monotonic()
        self._is_gone = False
        self._environment = environment
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # On no disk: that of temporary files may be full, or read-only.
        self._log = open(os.memfd_create("tp-runtime-fork-server-log", os.MFD_CLOEXEC), "r+b")  # noqa: SIM115  (open as long as this object)
        command = [python, "-c", _SERVER_CODE, str(theirs.fileno())]
        command += ["keep"] if keep else []
        started: Future[subprocess.Popen[bytes]] = Future()

        def own() -> None:
            """Thread: start the process, which ends with this thread, and reap it."""
            try:
                with theirs:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=self._log,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,
                    )
            except BaseException as error:  # noqa: BLE001  raised where the server was asked for
                started.set_exception(error)
            else:
                started.set_result(process)
                process.wait()

        try:
            threading.Thread(target=own, name="tp-runtime-fork-server", daemon=True).start()
        except RuntimeError as error:
            theirs.close()
            raise OSError(errno.EAGAIN, str(error)) from error
        self._process = started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_up(self, poll: Poll, timeout_s: float) -> None:
        """Returns when ranks can be forked. What ``poll`` raises ends the wait.

        Raises:
            ForkServerError: it has ended, or was ended because it is not up in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._ask(None) as answers:
            while not wait([answers], POLL_S):
                poll()
                if time.monotonic() > deadline:
                    self._process.kill()
                    raise ForkServerError(f"was not ready after {timeout_s:g} s")
            if not answers.recv(MAX_ANSWER_BYTES):
                raise self._gone()

    def fork(
        self, worker: WorkerConfig, environment: Mapping[str, str], fds: Sequence[int]
    ) -> tuple[int, int, socket.socket]:
        """Have a rank forked that gets ``fds``: of its channel, the shared memory and its log.

        Returns its process id, a pidfd of it, and the socket on which its exit status will come.

        Raises:
            ForkServerError: as ``wait_until_up``; or the system has no room for a process.
        """
        changes = [
            (os.fsencode(name), None if value is None else os.fsencode(value))
            for name in environment.keys() | self._environment.keys()
            if (value := environment.get(name)) != self._environment.get(name)
        ]
        answers = self._ask(msgspec.structs.replace(worker, environment=changes), fds)
        try:
            if not wait([answers], FORK_TIMEOUT_S):
                self._process.kill()
                raise ForkServerError(f"did not fork a rank within {FORK_TIMEOUT_S:g} s")
            packet, pidfds = receive_with_fds(answers, max_fds=1)
            if not packet:
                raise self._gone()
            answer = msgspec.json.decode(packet, type=int | str)
            if isinstance(answer, str):
                raise ForkServerError(f"could not fork: {answer}")
            return answer, pidfds[0], answers
        except BaseException:
            answers.close()
            raise

    def _ask(self, request: WorkerConfig | None, fds: Sequence[int] = ()) -> socket.socket:
        """Send a request; returns the socket on which the answers to it come."""
        answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                packet = msgspec.json.encode(request)
                socket.send_fds(self._requests, [packet], [theirs.fileno(), *fds])
            except ConnectionError:  # a reset where it ended with a request unread
                answers.close()
                raise self._gone() from None
        return answers

    def _gone(self) -> ForkServerError:
        self._is_gone = True
        return ForkServerError(self.describe_exit())

    def has_ended(self) -> bool:
        return self._is_gone or self._process.poll() is not None

    def describe_exit(self) -> str:
        """How the process ended, for a message to a person; it has closed its connection."""
        try:
            return reasons.how_ended(self._process.wait(EXIT_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "closed its connection and was ended"

    def kill(self) -> None:
        """End the process at once, if it has not ended; and with it what was forked from it."""
        self._process.kill()

    def log_tail(self) -> str:
        """The end of what the process has printed while it imported."""
        return tail_of(self._log)


_servers: dict[Hashable, ForkServer] = {}
_lock = threading.Lock()


def fork_server(python: str, environment: Mapping[str, str], *, keep: bool = False) -> ForkServer:
    """The running server for that Python and environment; it may be a new one, not yet up.

    ``keep``: a new one ends with this process only, however long it has no rank.

    Raises OSError if it cannot be started.
    """
    fixed = {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_BY_IMPORTS) and name not in COMPILE_CACHES  # read by whom compiles
    }
    # A process that was forked from this one has none of its servers.
    key = (os.getpid(), python, frozenset(fixed.items()))
    with _lock:
        for ended in [key for key, server in _servers.items() if server.has_ended()]:
            del _servers[ended]
        if key not in _servers:
            _servers[key] = ForkServer(python, environment, keep)
        return _servers[key]
