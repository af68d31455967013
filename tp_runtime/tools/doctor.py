"""``python -m tp_runtime doctor``: whether this machine can run models, and what to do if not.

Looks at this Python, at the one that runs the ranks through ``probe``, which runs there, and at
this machine. Starts no group and changes nothing. Needs the standard library only.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .. import machine, reasons
from ..settings import PACKAGE, home, runtime_python

# Versions that the ranks work with; the extra `runtime` of pyproject.toml has the same.
REQUIREMENTS = {"vllm": ">=0.26,<=0.33.0", "diffusers": ">=0.42,<0.43"}
# What this Python must have: the dependencies of pyproject.toml, and ComfyUI's torch.
DEPENDENCIES = ("msgspec", "platformdirs", "psutil", "safetensors", "torch")
DISTRIBUTION = "tensor-parallel"  # its name in pyproject.toml
OLDEST_PYTHON = (3, 11)  # of vLLM and diffusers; ComfyUI's own may be older
SHARED_MEMORY_BYTES = 2**30  # NCCL's buffers between GPUs that cannot reach each other directly
TIMEOUT_S = 180.0
# What a start of a small group opens and starts in ComfyUI's process, with some room.
OPEN_FILES, THREADS = 64, 16

_PROBE = Path(__file__).with_name("probe.py")
_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One finding. ``failed``: nothing runs; ``missing``: runs, but not well, or on the CPU only.

    ``advice`` says what to do; it is empty where all is well.
    """

    name: str
    status: Literal["ok", "missing", "failed"]
    text: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which Python."""
    parser.add_argument(
        "--python", help="the Python of the ranks (default: TP_RUNTIME_PYTHON, else this one)"
    )


def run(options: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them is in the way."""
    checks = examine(options.python)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = f"{check.status:8} {check.name:{width}}  {check.text}"
        print(f"{line} {check.advice}" if check.advice else line)
    return int(any(check.status == "failed" for check in checks))


def examine(python: str | None = None) -> list[Check]:
    """Every check; takes some seconds. ``python``: of the ranks, by default the configured one.

    Where that Python does not start, this is the only finding.
    """
    python = python or runtime_python()
    try:
        found = _probe(python)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [
            Check(
                "Runtime Python",
                "failed",
                f"{python} does not run: {_one_line(error)}",
                reasons.advice(str(error))
                or "Set TP_RUNTIME_PYTHON to a Python that has vllm and diffusers.",
            )
        ]
    checks = [_this_python(), _python(python, found["python"])]
    checks += [_package(python, name, package) for name, package in found["packages"].items()]
    checks += _gpus(found)
    checks += [_shared_memory(found), _system_calls(), _limits(), _log_folder()]
    return checks


def _probe(python: str) -> dict[str, Any]:
    """What ``probe`` finds. Raises OSError, SubprocessError, or ValueError for a strange answer."""
    done = subprocess.run(
        [python, "-"],
        input=f"{_PROBE.read_text()}\nmain({REQUIREMENTS!r})\n",
        capture_output=True,
        text=True,
        cwd="/",  # the first place that Python looks for modules in
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise subprocess.SubprocessError(f"it {reasons.how_ended(done.returncode)}. {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return found


def _one_line(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {TIMEOUT_S:g} s."
    if isinstance(error, ValueError):
        return "it does not behave like a Python."
    if isinstance(error, OSError):
        return f"{error.strerror}."
    return " ".join(str(error).split())


def _this_python() -> Check:
    missing = [name for name in DEPENDENCIES if importlib.util.find_spec(name) is None]
    if not missing:
        return Check("This Python", "ok", f"{sys.executable}, with {', '.join(DEPENDENCIES)}")
    advice = f"Run: {_install(sys.executable)}"
    if "torch" in missing:
        advice = f"Use ComfyUI's Python, which has torch. {advice}"
    text = f"{sys.executable} lacks {', '.join(missing)}."
    return Check("This Python", "failed", text, advice)


def _install(python: str, extra: str = "") -> str:
    """The command that installs what the package, or an extra of it, needs."""
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file():
        names = ["requirements.txt", *([f"requirements-{extra}.txt"] if extra else [])]
        needed = [word for name in names for word in ("-r", str(checkout / name))]
    else:  # installed from a wheel
        declared = [one.partition(";") for one in importlib.metadata.requires(DISTRIBUTION) or []]
        wanted = f'extra == "{extra}"' if extra else ""
        needed = [needed.strip() for needed, _, when in declared if when.strip() in ("", wanted)]
    return f"{python} -m pip install {' '.join(map(shlex.quote, needed))}"


def how_to_have_runtime(python: str) -> str:
    """What to do where the ranks' Python lacks vLLM or diffusers.

    If it is this Python, ComfyUI's, the ranks had better have one of their own: vLLM would replace
    its torch.
    """
    if python != sys.executable:
        return (
            f"Run: {_install(python, 'runtime')}, or set TP_RUNTIME_PYTHON to a Python that has "
            "vllm and diffusers."
        )
    own = Path("~/tp-runtime")
    return (
        "The GPU processes need their own Python: the tab 'Tensor Parallel' makes one. Or run: "
        f"python3 -m venv {own} && {_install(f'{own}/bin/python', 'runtime')}; and name "
        f"{own}/bin/python in the setting 'Python of the GPU processes', or in TP_RUNTIME_PYTHON. "
        f"(Installed into {python} itself, vLLM replaces its torch, torchvision and numpy.)"
    )


def _python(python: str, version: str) -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    if tuple(map(int, version.split(".")[:2])) < OLDEST_PYTHON:
        advice = f"Set TP_RUNTIME_PYTHON to Python {oldest} or newer."
        return Check("Runtime Python", "failed", f"{python} is Python {version}.", advice)
    return Check("Runtime Python", "ok", f"{python}, Python {version}")


def _package(python: str, name: str, found: dict[str, Any]) -> Check:
    install = how_to_have_runtime(python)
    if found["error"]:
        text = f"cannot be imported ({found['error']})."
        return Check(name, "failed", text, reasons.advice(found["error"]) or install)
    if not found["fits"]:
        text = f"{found['version']} is outside {REQUIREMENTS[name]}."
        return Check(name, "failed", text, install)
    return Check(name, "ok", found["version"])


def _gpus(found: dict[str, Any]) -> list[Check]:
    if "gpus" not in found:  # there is no torch to ask
        return []
    gpus = found["gpus"]
    if not gpus:
        build = f"for CUDA {found['cuda_build']}" if found["cuda_build"] else "without CUDA"
        return [
            Check(
                "GPUs",
                "missing",
                f"none visible to torch (built {build}): models run on the CPU, slowly.",
                "For GPU use: install NVIDIA's driver, see that `nvidia-smi` lists the GPUs and "
                "that CUDA_VISIBLE_DEVICES does not hide them, and use a CUDA build of torch.",
            ),
            Check("P2P and NCCL", "missing", "not checked: they need a GPU."),
        ]
    names = [f"{gpu['name']} {gpu['total_bytes'] / _GIB:.0f} GiB" for gpu in gpus]
    unlike = (
        "They are not alike: every GPU has an equal share of a model, so the slowest sets the "
        "pace, and the smallest what fits. 'auto' leaves out those that do not help; 'devices' of "
        "the loader, or the setting 'GPUs to use', says which are used."
    )
    listed = f"{len(gpus)}: {', '.join(names)}"
    all_gpus = Check("GPUs", "ok", listed, unlike if len(set(names)) > 1 else "")
    return [all_gpus, _p2p(found), _link(found), _nccl(found)]


def _p2p(found: dict[str, Any]) -> Check:
    if len(found["gpus"]) == 1:
        return Check("P2P", "ok", "not needed with one GPU")
    if found["apart"]:
        pairs = ", ".join(f"{first} and {second}" for first, second in found["apart"])
        names = {found["gpus"][index]["name"] for pair in found["apart"] for index in pair}
        if all("GeForce" in name for name in names):
            return Check(
                "P2P",
                "ok",
                f"GPUs {pairs} do not reach each other directly: GeForce cards cannot. NCCL goes "
                "through the host's memory, which 'auto' counts with (docs/scaling.md).",
            )
        return Check(
            "P2P",
            "missing",
            f"GPUs {pairs} do not reach each other directly: NCCL goes through the host's memory.",
            "Right, but slower. In a virtual machine pass NVLink or peer access on; on bare metal "
            "see whether the IOMMU or ACS is in the way.",
        )
    return Check("P2P", "ok", "every GPU reaches every other one")


def _link(found: dict[str, Any]) -> Check:
    """How fast the GPUs send to one another, if a group has measured it (``link_records``)."""
    gpus = [f"{index} {gpu['name']}" for index, gpu in enumerate(found["gpus"])]
    if len(gpus) == 1:
        return Check("Link", "ok", "not needed with one GPU")
    measured = [one for one in _measured_links() if set(one["gpus"]) <= set(gpus)]
    expect = (
        f"`python -m tp_runtime plan --predict --model NAME --tp {len(gpus)}` says what a step is "
        "expected to take in each layout."
    )
    if not measured:
        return Check("Link", "ok", "not measured yet: the first group does it.", expect)
    most = max(measured, key=lambda one: len(one["gpus"]))
    rates = "{rate:.1f} GB/s in sums, {exchange_rate:.1f} GB/s in exchanges".format(
        **{name: most["rates"][name] / 1e9 for name in ("rate", "exchange_rate")}
    )
    if read := most["rates"].get("host_rate"):
        rates += f", {read / 1e9:.1f} GB/s from the host's memory"
    numbers = ", ".join(one.partition(" ")[0] for one in most["gpus"])
    return Check("Link", "ok", f"measured on the GPUs {numbers}: {rates}.", expect)


def _measured_links() -> list[dict[str, Any]]:
    """Those of this machine; none, if the file is not there or another's."""
    try:
        book = json.loads((home() / "link_records.json").read_text())
        entries = list(book.values())
        return [one for one in entries if one["machine"] == platform.node() and one["rates"]]
    except (OSError, ValueError, AttributeError, LookupError, TypeError, ModuleNotFoundError):
        return []


def _nccl(found: dict[str, Any]) -> Check:
    if "out of memory" in found.get("nccl_error", "").lower():
        return Check(
            "NCCL",
            "failed",
            f"a GPU has no memory left for a sum over all ({found['nccl_error']}).",
            "Another program holds it: nvidia-smi shows which. End it, or leave that GPU out: "
            "'devices' of the loader, or the setting 'GPUs to use'.",
        )
    if "nccl_error" in found:
        return Check(
            "NCCL",
            "failed",
            f"a sum over all GPUs failed ({found['nccl_error']}).",
            "Run again with NCCL_DEBUG=INFO to see why; in a container, see that it has all GPUs "
            "and a large /dev/shm.",
        )
    return Check("NCCL", "ok", f"{found['nccl']}, a sum over {len(found['gpus'])} GPUs is right")


def _shared_memory(found: dict[str, Any]) -> Check:
    """NCCL's: nothing else makes files in /dev/shm."""
    if len(found.get("gpus", [])) < 2:
        return Check("Shared memory", "ok", "/dev/shm is not needed with fewer than two GPUs")
    try:
        free = shutil.disk_usage("/dev/shm").free if os.access("/dev/shm", os.W_OK) else 0
    except OSError:
        free = 0
    text = f"{free / _GIB:.1f} GiB free in /dev/shm"
    if free >= SHARED_MEMORY_BYTES:
        return Check("Shared memory", "ok", text)
    needed = "NCCL needs about 1 GiB there where GPUs do not reach each other directly"
    status: Literal["failed", "missing"] = "failed" if found["apart"] else "missing"
    return Check("Shared memory", status, f"{text}; {needed}.", reasons.advice("/dev/shm"))


def _system_calls() -> Check:
    if refused := machine.refused_system_call():
        return Check("System calls", "failed", f"refused: {refused}.", reasons.advice(refused))
    return Check("System calls", "ok", "what a group needs is allowed")


def _limits() -> Check:
    """Tried, not counted: many limits add up (of the user, of the process, of the container)."""
    done = threading.Event()
    try:
        with contextlib.ExitStack() as at_end:
            at_end.callback(done.set)
            for _ in range(THREADS):
                threading.Thread(target=done.wait, daemon=True).start()
            for _ in range(OPEN_FILES):
                at_end.callback(os.close, os.open("/dev/null", os.O_RDONLY))
    except (OSError, RuntimeError) as error:
        return Check("Limits", "failed", f"{error}.", reasons.advice(str(error)))
    return Check("Limits", "ok", f"{OPEN_FILES} more open files and {THREADS} more threads")


def _log_folder() -> Check:
    try:
        folder = home()
    except ModuleNotFoundError as error:
        text = f"not known without {error.name}."
        advice = f"Run: {_install(sys.executable)}, or: {reasons.STATE_FOLDER}"
        return Check("Log folder", "failed", text, advice)
    shown = reasons.printable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            (Path(inside) / "log").write_text("x" * 4096)
    except OSError as error:
        text = f"{shown} cannot be written ({error.strerror})."
        advice = reasons.advice(str(error)) or reasons.STATE_FOLDER
        return Check("Log folder", "failed", text, advice)
    return Check("Log folder", "ok", shown)
