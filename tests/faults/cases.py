"""Every fault that is tested, when, and what it must come to within which time.

The table of `docs/reliability.md` is made of these rows; the tests look theirs up with `case`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from support.paths import REPOSITORY

PAGE = REPOSITORY / "docs/reliability.md"
BEGIN, END = "<!-- faults -->\n", "<!-- end of faults -->\n"

PHASES = ("start", "load", "compile", "evaluate", "idle", "sleep", "unload")
CALL_TIMEOUT_S = 5.0  # in these tests
START_TIMEOUT_S = 25.0

DEATH_S = 1.0
RAISED_S = 1.0
SLACK_S = 2.0  # after a timeout
DELAY_S = 0.3
DELAYED_S = 3.0
FILE_S = 10.0


@dataclass(frozen=True)
class Case:
    """`result`: what the caller sees; an error of tp_runtime by its name, or that it works."""

    phase: str
    fault: str
    result: str
    bound_s: float


def _injected(phase: str) -> list[Case]:
    timeout_s = START_TIMEOUT_S if phase == "start" else CALL_TIMEOUT_S
    start = "GroupStartError" if phase == "start" else ""
    return [
        Case(phase, "a rank dies", start or "GroupDiedError", DEATH_S),
        Case(phase, "a rank stops", start or "CallTimeoutError", timeout_s + SLACK_S),
        Case(phase, "a rank raises", start or "RankError", RAISED_S),
        Case(phase, "a rank allocates too much", start or "RankMemoryError", RAISED_S),
        Case(phase, "a GPU is out of memory", start or "RankMemoryError", RAISED_S),
        Case(phase, "a rank is late", "works", DELAYED_S + (START_TIMEOUT_S if start else 0)),
    ]


INJECTED = [case for phase in PHASES for case in _injected(phase)]
OTHERS = [
    Case("start", "no file descriptor is left", "TPRuntimeError", 1.0),
    Case("start", "the disk of the logs is full", "works", START_TIMEOUT_S),
    Case("start", "few files may be open", "TPRuntimeError", 2.0),
    Case("start", "the fork server may open few files", "GroupStartError", 5.0),
    Case("start", "the address space of the ranks is small", "GroupStartError", 5.0),
    Case("start", "no thread can be started", "GroupStartError", 2.0),
    Case("start", "the state folder is full", "works", START_TIMEOUT_S),
    Case("start", "the state folder is read-only", "GroupStartError", 2.0),
    Case("start", "/dev/shm is full", "works", START_TIMEOUT_S),
    Case("start", "/dev/shm is read-only", "works", START_TIMEOUT_S),
    Case("start", "/dev/shm is absent", "works", START_TIMEOUT_S),
    Case("start", "TMPDIR and TP_RUNTIME_HOME have odd names", "works", START_TIMEOUT_S),
    Case("start", "a sandbox refuses pidfd_open", "GroupStartError", 2.0),
    Case("start", "a sandbox refuses pidfd_open to the ranks", "GroupStartError", 5.0),
    Case("idle", "a sandbox refuses pidfd_send_signal", "the ranks end", 5.0),
    Case("start", "the fork server ends with a request unread", "GroupStartError", 2.0),
    Case("load", "the file was replaced before", "CheckpointError; the group stays", FILE_S),
    Case("load", "one rank alone refuses the file", "CheckpointError; the group stays", 2.0),
    Case("load", "one rank alone cannot read the file", "RankError", RAISED_S),
    Case("load", "the file changes", "RankError", FILE_S),
    Case("load", "the file is cut short", "GroupDiedError", FILE_S),
    Case("idle", "a rank dies, and a request comes at once", "works", START_TIMEOUT_S),
    Case("load", "a rank dies while others wait", "they work", START_TIMEOUT_S),
    Case("evaluate", "a rank dies while others wait", "they work", START_TIMEOUT_S),
    Case("sleep", "a rank dies while others wait", "they work", START_TIMEOUT_S),
    Case("unload", "a rank dies while others wait", "they work", START_TIMEOUT_S),
    Case("start", "a rank dies while others wait", "they work", START_TIMEOUT_S),
    Case("evaluate", "a rank's socket is lost", "GroupDiedError", 2.0),
    Case("evaluate", "no shared memory is left", "TPRuntimeError; the group stays", 1.0),
    Case("evaluate", "the container has no memory left", "TPRuntimeError; the group stays", 2.0),
    Case("evaluate", "a rank sends garbage", "ProtocolError", 1.0),
    Case("evaluate", "a rank sends a frame of another version", "ProtocolError", 1.0),
    Case("evaluate", "a rank sends a frame that is too long", "ProtocolError", 1.0),
    Case("evaluate", "a rank sends an answer twice", "ProtocolError", 1.0),
    Case("idle", "a rank receives garbage", "RankError", 1.0),
    Case("evaluate", "a rank logs without end", "works", 5.0),
    Case("evaluate", "the machine stands still", "works", 5.0),
    Case("any", "a process with a group is killed", "the ranks end", 5.0),
    Case("any", "ComfyUI is killed", "the ranks end", 5.0),
]
CASES = [*INJECTED, *OTHERS]


def case(phase: str, fault: str) -> Case:
    """The row of a test."""
    (found,) = (row for row in CASES if (row.phase, row.fault) == (phase, fault))
    return found


def table(observed: Mapping[Case, float], day: date) -> str:
    """The table in Markdown."""
    lines = [
        f"Observed on {day}, on two busy CPU cores:\n",
        "| phase | fault | ends in | bound, s | observed, s |",
        "|---|---|---|---|---|",
    ]
    for row in CASES:
        lines.append(
            f"| {row.phase} | {row.fault} | {row.result} | {row.bound_s:g} | {observed[row]:.2f} |"
        )
    return "\n".join(lines) + "\n"


def write_table(observed: Mapping[Case, float], day: date) -> None:
    """Replace the table of the page."""
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(before + BEGIN + table(observed, day) + END + after)


def rows_of_page() -> list[tuple[str, ...]]:
    """The table's rows without what was observed."""
    _, rest = PAGE.read_text().split(BEGIN)
    lines = [line for line in rest.split(END)[0].splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.split("|")[1:5]) for line in lines[1:]]
