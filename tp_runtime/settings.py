"""Settings that a Python without any package can read: what ``doctor`` needs. See ``config``."""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the folder of this package


def runtime_python(preferred: str | None = None) -> str:
    """The Python that runs the ranks: the environment's, else ``preferred``, else this one."""
    python = os.environ.get("TP_RUNTIME_PYTHON") or preferred or sys.executable
    # A name without a folder is looked for on the PATH.
    return str(Path(python).expanduser().absolute()) if os.sep in python else python


def home() -> Path:
    """Folder that holds one private folder per live group (its logs), as an absolute path.

    Raises ModuleNotFoundError where the environment names none and platformdirs is missing.
    """
    configured = os.environ.get("TP_RUNTIME_HOME")
    if configured:
        return Path(configured).expanduser().absolute()
    import platformdirs  # here, since a rank's Python need not have it

    return Path(platformdirs.user_state_dir("tp-runtime"))
