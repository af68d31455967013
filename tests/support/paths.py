"""Where things are: the pack's checkout and the ComfyUI that the tests run."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TEST_PACK = Path(__file__).resolve().parent / "comfy_pack"
TOY_PACK = REPOSITORY / "examples" / "shapes"
LIGHT_SITE = Path(__file__).resolve().parent / "light_site"
# A newer frontend than ComfyUI's own, which `make comfyui` fetches.
NEWER_FRONTEND = REPOSITORY / ".frontend"


def comfyui_path() -> Path:
    """Root of the ComfyUI to test with: `$COMFYUI_PATH`, else the folder `make comfyui` fills.

    Raises:
        FileNotFoundError: there is no ComfyUI at that place.
    """
    root = Path(os.environ.get("COMFYUI_PATH") or REPOSITORY / ".comfyui").resolve()
    if not (root / "main.py").is_file():
        raise FileNotFoundError(
            f"no ComfyUI in {root}: run `make comfyui`, or set COMFYUI_PATH to a ComfyUI checkout"
        )
    return root
