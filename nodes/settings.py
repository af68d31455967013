"""The settings of the pack in ComfyUI's settings dialog that Python needs, as they are stored.

They say what runs on this machine, so they are the machine's, not a user's: with `--multi-user`
they are not read, and the environment alone decides. The environment overrides them in any case.
"""

import json
import re
import time
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

from ..tp_runtime.client import GroupStartError, reproducible

_PYTHON = "TensorParallel.Runtime.Python"
_DEVICES = "TensorParallel.Runtime.Devices"
_PREPARE = "TensorParallel.Runtime.Prepare"
_REPRODUCIBLE = "TensorParallel.Runtime.Reproducible"
PREPARE = ("auto", "always", "when used")
_WRITING_S, _AGAIN_S = 2.0, 0.05  # ComfyUI writes the file in place, on a disk that may be busy
_PYTHON_NAME = re.compile(r"python(\d+(\.\d+)*)?t?")


def python_setting() -> str | None:
    """The Python that runs the ranks, if it is set.

    Raises:
        GroupStartError: it is no path of a Python, or in a folder that ComfyUI writes to. ComfyUI
            takes settings and files over the network, so that nothing else may be started
            through this one; some file systems take every file for a program.
    """
    text = str(_stored().get(_PYTHON) or "").strip()
    if not text:
        return None
    try:
        path = Path(text).expanduser()
        is_python = path.is_absolute() and _PYTHON_NAME.fullmatch(path.name) and path.is_file()
        is_python = is_python and not any(map(path.resolve().is_relative_to, _uploads()))
    except (RuntimeError, OSError, ValueError):  # nobody's home; a name that is too long, or none
        is_python = False
    if not is_python:
        raise GroupStartError(
            f"The setting 'Python of the GPU processes' is {text!r}, which is no path of a Python "
            "such as /home/me/tp-runtime/bin/python, outside of the folders that ComfyUI writes "
            "to. Change it in ComfyUI's settings, or clear it."
        )
    return str(path)


def _uploads() -> list[Path]:
    """The folders into which ComfyUI puts what it is sent."""
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
        folder_paths.get_user_directory(),
    )
    return [Path(folder).resolve() for folder in folders]


def prepare_setting() -> str:
    """When what the GPU processes are forked from is started: one of `PREPARE`.

    With ComfyUI where it sees several GPUs (`auto`), or anywhere and for as long as ComfyUI runs
    (`always`); or when a page shows a loader, or a prompt has one (`when used`).

    Raises:
        GroupStartError: it is none of them.
    """
    chosen = _stored().get(_PREPARE) or PREPARE[0]
    if chosen not in PREPARE:
        raise GroupStartError(
            f"The setting 'Prepare the GPU processes' is {chosen!r}: choose one of "
            f"{', '.join(PREPARE)} in ComfyUI's settings."
        )
    return chosen


def reproducible_setting() -> bool:
    """Whether what was measured decides neither layout nor attention kernel."""
    return reproducible(_stored().get(_REPRODUCIBLE) is True)


def devices_setting() -> str:
    """The GPUs that may be used, as a person writes them; empty: all."""
    return str(_stored().get(_DEVICES) or "")


def _stored() -> dict[str, Any]:
    """ComfyUI's settings file of the only user there is."""
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    if args.multi_user or not file.is_file():
        return {}
    problem = None
    deadline = time.monotonic() + _WRITING_S
    while problem is None or time.monotonic() < deadline:
        try:
            settings = json.loads(file.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            problem = str(error)
            time.sleep(_AGAIN_S)
            continue
        if isinstance(settings, dict):
            return settings
        problem = f"it holds a {type(settings).__name__}, not settings by name"
        break
    raise GroupStartError(
        f"ComfyUI's settings {file} cannot be read ({problem}). Repair the file, or remove it and "
        "set what you need again."
    )
