"""Settings that a Python without any package can read: what ``doctor`` needs. See ``config``."""

import contextlib
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the folder of this package


def runtime_python(preferred: str | None = None) -> str:
    """The Python that runs the ranks: the environment's, else ``preferred``, else this one."""
    python = os.environ.get("TP_RUNTIME_PYTHON") or preferred or sys.executable
    # A name without a folder is looked for on the PATH.
    return str(_absolute(python)) if os.sep in python else python


def _absolute(path: str) -> Path:
    """As a person writes it: `~` is the home, as far as there is one of that name."""
    written = Path(path)
    with contextlib.suppress(RuntimeError):  # there is no such person
        written = written.expanduser()
    return written.absolute()


def home() -> Path:
    """Folder that holds one private folder per live group (its logs), as an absolute path.

    Raises ModuleNotFoundError where the environment names none and platformdirs is missing.
    """
    configured = os.environ.get("TP_RUNTIME_HOME")
    if configured:
        return _absolute(configured)
    import platformdirs  # here, since a rank's Python need not have it

    return Path(platformdirs.user_state_dir("tp-runtime"))
