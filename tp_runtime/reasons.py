"""Why the system refused something, and what to do: the same sentence, whoever meets the limit.

A reason is known by the system's own words (``strerror``), which an error in this process has, and
what a rank says, and a log. Standard library only: ``doctor`` and every process use it.
"""

import os
import re
import signal

STATE_FOLDER = "Set TP_RUNTIME_HOME to a folder that can be written and has room."
# Words of the system → what to do. The first that fits counts.
_ADVICE = {
    r"/dev/shm": (
        "See that /dev/shm is there, can be written and has room (in Docker: --shm-size=2g or "
        "--ipc=host; in Kubernetes: an emptyDir of medium Memory)."
    ),
    r"[Tt]oo many open files": (
        "Raise the limit of open files (ulimit -n, LimitNOFILE=, or Docker's --ulimit nofile), or "
        "restart ComfyUI."
    ),
    r"Resource temporarily unavailable|can't start new thread|Thread creation failed": (
        "Raise the limit of processes and threads (ulimit -u, TasksMax=, or the container's pids "
        "limit), or end other programs."
    ),
    r"Cannot allocate memory|^MemoryError|failed to map segment": (
        "Free memory of this machine, or raise the limit that holds (the container's memory, or "
        "the address space: ulimit -v)."
    ),
    r"No space left on device|Disk quota exceeded": f"Free room on the disk, or: {STATE_FOLDER}",
    r"No usable temporary directory": "Set TMPDIR to a folder that can be written.",
    r"Read-only file system": STATE_FOLDER,
    r"File too large": "Raise the limit of the size of files (ulimit -f).",
    r"Function not implemented|Operation not permitted|Bad system call": (
        "A sandbox or an old kernel refuses a system call: allow it (in Docker: a newer Docker, "
        "or --security-opt seccomp=PROFILE), or run ComfyUI outside of it."
    ),
}

# Signals that say more than their names.
_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "by somebody, or by Linux because the memory of the host or container ran out",
    signal.SIGBUS: (
        "a file that it was reading was cut short, or the memory of the host or of a tmpfs ran out"
    ),
    signal.SIGSYS: "a sandbox does not allow a system call that it made",
    signal.SIGILL: "this processor lacks an instruction that a package of its Python was built for",
    signal.SIGXFSZ: "a file would have grown beyond the limit, ulimit -f",
    signal.SIGXCPU: "it has used up its CPU time, ulimit -t",
}


def advice(text: str) -> str:
    """What to do about a failure, by the words of the system in ``text``; empty if unknown."""
    for words, what_to_do in _ADVICE.items():
        if re.search(words, text, re.MULTILINE):
            return what_to_do
    return ""


def of(error: BaseException) -> str:
    """What went wrong, and what to do, as sentences."""
    text = str(error) or type(error).__name__
    return " ".join(filter(None, [f"{text.rstrip('.')}.", advice(text)]))


def how_ended(code: int) -> str:
    """How a process ended; ``code`` as ``subprocess`` counts it: signals below 0.

    A shell that ran it adds 128 to the signal's number.
    """
    by_signal = -code if code < 0 else code - 128
    if code >= 0 and by_signal not in _SIGNALS:
        return f"exited with status {code}"
    name = signal.strsignal(by_signal) or "unknown"
    why = _SIGNALS.get(by_signal, name)
    how = f"was killed by signal {by_signal}"
    return (
        f"{how} ({why})"
        if code < 0
        else f"exited with status {code}, as a shell says that it {how} ({why})"
    )


def printable(path: "str | os.PathLike[str]") -> str:
    """The path for a message or a title: bytes that are no UTF-8 are spelled out."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode()
