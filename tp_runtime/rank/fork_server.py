"""The process that ranks are forked from.

It imports once what every rank needs (``imports``), which takes five seconds or more, and the ranks
share the memory of it. It has one thread, computes nothing and never touches a GPU, so that a fork
of it is sound.

Started by ``forking``, on whose socket requests come, each with a socket for the answers: a
``WorkerConfig`` and file descriptors, answered with the number of the new process and later with
how it ended, or with the reason if there can be none; or ``null``, answered once ranks can be
forked. It ends with that socket or, while it has no rank, after some minutes without a request,
unless the word ``keep`` follows the socket on its command line. ``everything`` there: the imports
leave nothing out.
"""

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import msgspec
from setproctitle import setproctitle

from ..config import WorkerConfig
from ..reasons import printable
from ..wire.transport import receive_with_fds, wait
from . import imports

KEEP, EVERYTHING = "keep", "everything"
IDLE_S = 300.0
# Of one request: for the answers, of the rank's channel, shared memory, log and rendezvous.
_MAX_FDS = 6
_PR_SET_PDEATHSIG = 1
_NICENESS = 5
# The driver's, once CUDA was asked for GPUs (there are none), and jemalloc's in pyarrow, which
# pandas and so transformers import: a rank that was forked beside both computed on its GPU.
_HARMLESS_THREADS = ("cuda", "jemalloc")


class _Child:
    """A rank that was forked, and the socket on which its engine waits for news of it."""

    def __init__(self, pid: int, answers: socket.socket) -> None:
        """Raises OSError: the process cannot be watched."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._answers = answers
        # The engine is not the parent: it watches and ends the process by its pidfd.
        with contextlib.suppress(OSError):  # the engine is gone
            socket.send_fds(answers, [msgspec.json.encode(pid)], [self.pidfd])

    def reap(self) -> None:
        """The process has ended: tell how, or null where the kernel does not say it."""
        exitcode = None
        with contextlib.suppress(ChildProcessError):  # a package has made SIGCHLD ignored
            exitcode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with contextlib.suppress(OSError):
            self._answers.send(msgspec.json.encode(exitcode))
        self.close()

    def close(self) -> None:
        os.close(self.pidfd)
        self._answers.close()


def serve(requests: socket.socket, idle_s: float | None) -> WorkerConfig | None:
    """Answer requests until there can be no more, or for ``idle_s`` without rank there is none.

    Returns once in every process that is to be a rank, with what that rank is told, and at last in
    the server itself, with None.
    """
    children: dict[int, _Child] = {}  # by pidfd
    while ready := wait([requests, *children], None if children else idle_s):
        for pidfd in children.keys() & set(ready):
            children.pop(pidfd).reap()
        if requests not in ready:
            continue
        packet, fds = receive_with_fds(requests, _MAX_FDS)
        if not packet:
            break
        config = msgspec.json.decode(packet, type=WorkerConfig | None)
        answers = socket.socket(fileno=fds[0])
        if config is None:
            with answers, contextlib.suppress(OSError):
                answers.send(b"up")
            continue
        pid = os.getpid()
        try:
            pid = _fork()
            if pid == 0:
                _write_to_log(fds[3])  # from here on, what goes wrong is in it
                requests.close()
                answers.close()
                for sibling in children.values():
                    sibling.close()
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                os.setsid()
                if config.device == "cpu":
                    _give_way()
                return _become_rank(config, *fds[1:])
            child = _Child(pid, answers)
        except OSError as error:  # no process, no memory, or a sandbox: others go on
            if pid == 0:
                raise
            _refuse(answers, pid, error)
        else:
            children[child.pidfd] = child
        for fd in fds[1:]:
            os.close(fd)
    return None


def _refuse(answers: socket.socket, pid: int, error: OSError) -> None:
    """There is no rank, or none that could be watched: nothing of it stays."""
    if pid != os.getpid():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # as in ``_Child.reap``
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    with answers, contextlib.suppress(OSError):
        answers.send(msgspec.json.encode(str(error)))


def _write_to_log(log_fd: int) -> None:
    """Have what this process prints in the rank's log."""
    for stream_fd in (1, 2):
        os.dup2(log_fd, stream_fd)


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns of every thread, those of _HARMLESS_THREADS, too.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _become_rank(
    config: WorkerConfig,
    control_fd: int,
    exchange_fd: int,
    log_fd: int,
    rendezvous_fd: int,
    part_fd: int = -1,
) -> WorkerConfig:
    """Make this process the rank's own; returns what the rank is told."""
    folder = printable(Path(f"/proc/self/fd/{log_fd}").readlink().parent)
    os.close(log_fd)
    setproctitle(f"tp_runtime.rank.worker: rank {config.rank} of {config.num_ranks} in {folder}")
    for name, value in config.environment:
        if value is None:
            os.environb.pop(name, None)
        else:
            os.environb[name] = value
    gc.enable()
    return msgspec.structs.replace(
        config,
        control_fd=control_fd,
        exchange_fd=exchange_fd,
        part_fd=part_fd,
        # torch opens its file again and again. Each rank has its own number for it.
        rendezvous=f"file:///proc/self/fd/{rendezvous_fd}",
    )


def _give_way() -> None:
    """Let ComfyUI and its page have the cores first: a rank keeps one of them busy for minutes.

    A session of its own is weighed by its own niceness (sched(7), "The autogroup feature"). With
    equal weights Linux 6.18 let a process that was ending wait for seconds beside busy ranks, and
    they live until that process has ended.
    """
    with contextlib.suppress(OSError):  # a sandbox refuses it
        os.nice(_NICENESS)
    while True:
        try:
            Path("/proc/self/autogroup").write_text(str(_NICENESS))
        except BlockingIOError:  # it can be set ten times a second, unless one is root
            time.sleep(0.02)
            continue
        except OSError:
            pass  # this kernel has none, or this container does not let it be set
        return


def _check_can_fork() -> None:
    """Raises RuntimeError if what is forked from this process could not compute."""
    import torch

    if torch.cuda.is_initialized():
        raise RuntimeError(
            "Importing what the ranks need has initialised CUDA, so no rank can be forked from "
            "this process. A package of the runtime's Python does that."
        )
    own = threading.get_native_id()
    threads = [task for task in Path("/proc/self/task").iterdir() if task.name != str(own)]
    names = sorted((thread / "comm").read_text().strip() for thread in threads)
    names = [name for name in names if not name.startswith(_HARMLESS_THREADS)]
    if names:
        raise RuntimeError(
            f"Importing what the ranks need has started threads ({', '.join(names)}), so no rank "
            "can be forked from this process. A package of the runtime's Python does that, or a "
            "variable of the environment makes one do it."
        )


def main() -> None:
    """Be the server of the socket on the command line; in what it forks, be a rank."""
    # Where it is ignored, which the start of a program does not end, the kernel tells no parent how
    # its children end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.disable()  # an eighth of the imports' time: they make hardly anything but what stays
    # Before the imports: setproctitle finds the command line's memory in front of that of the first
    # variable of the environment, which an import may replace (1.3.8, src/spt_setup.c). Then
    # neither this process nor a rank could have a title.
    setproctitle(f"tp_runtime.rank.fork_server: {sys.argv[0]}")
    lean = EVERYTHING not in sys.argv
    try:
        imports.import_all(lean=lean)
        _check_can_fork()
    except BaseException as error:  # noqa: BLE001  the engine shows it
        traceback.print_exc()
        if lean and isinstance(error, ImportError):
            # A package that is installed here needs what was left out: from the beginning, with it.
            sys.stderr.flush()
            os.execv(sys.executable, [*sys.orig_argv, EVERYTHING])
        # Not sys.exit: it would wait for threads that an import has started.
        os._exit(1)
    gc.freeze()  # so that no rank's collection touches, and thereby copies, what all share
    server_pid = os.getpid()
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        requests.set_inheritable(False)
        config = serve(requests, None if KEEP in sys.argv else IDLE_S)
    if config is not None:
        from . import worker

        worker.run(config, parent_pid=server_pid)


if __name__ == "__main__":
    main()
