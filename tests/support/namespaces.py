"""Programs in a mount namespace of their own, where a test may change what is mounted."""

import subprocess
import sys

import pytest

UNSHARE = ["unshare", "--mount", "--propagation", "private"]


def python_with_own_mounts(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the code in a Python that may mount and unmount. Skips the test where nobody may."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a mount namespace may not be made here (unshare --mount)")
    return subprocess.run(
        [*UNSHARE, sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
