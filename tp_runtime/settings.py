"""Settings that a Python without any package can read: what ``doctor`` needs. See ``config``."""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the folder of this package


def runtime_python(preferred: str | None = None) -> str:
    """The Python that runs the ranks: the environment's, else ``preferred``, else this one."""
    return os.environ.get("TP_RUNTIME_PYTHON") or preferred or sys.executable


def home() -> Path:
    """Folder that holds one private folder per live group (logs, rendezvous file).

    Raises ModuleNotFoundError where the environment names none and platformdirs is missing.
    """
    configured = os.environ.get("TP_RUNTIME_HOME")
    if configured:
        return Path(configured)
    import platformdirs  # here, since a rank's Python need not have it

    return Path(platformdirs.user_state_dir("tp-runtime"))
