"""What ComfyUI 0.33 computes with tiny quantised files: which files, on which inputs, and where the
results are kept (`tests/data/quantised_references.safetensors`).

`python -m support.quantised_references` makes that file, in the Python of a ComfyUI which knows the
formats and with `COMFYUI_PATH` at its source (`CONTRIBUTING.md`). The results are of fp32.
"""

import json
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.inputs import make_inputs
from support.lora_files import factors
from support.paths import REPOSITORY
from support.quantised_files import FORMATS, write_quantised
from support.tiny_models import tiny, write_tiny

FILE = REPOSITORY / "tests" / "data" / "quantised_references.safetensors"
PLAIN = "plain"  # the same weights before they are quantised
STRENGTH = 0.8

_PICTURE: dict[str, Any] = {"height": 8, "width": 8, "length": 9}
_VIDEO: dict[str, Any] = _PICTURE | {"frames": 3, "time_scale": 1000.0}
INPUTS = {
    "z_image": _PICTURE | {"num_tokens": 9},
    "flux": _PICTURE,
    "qwen_image": _PICTURE,
    "flux2": _PICTURE,
    "wan": _VIDEO,
}
# Every family in the format that most people download; two of them in the others, one with q, k and
# v in one tensor.
CASES = [
    *((family, "int8_convrot") for family in INPUTS),
    *(("qwen_image", name) for name in FORMATS if name != "int8_convrot"),
    *(("flux", name) for name in ("fp8", "nvfp4_awq", "w4a8")),
]
# Patched, in each format that is quantised anew in a way of its own.
PATCHED = ("int8_convrot", "nvfp4", "mxfp8", "w4a4", "w4a8", "int8_scalar")
PATCHED_FAMILY = "qwen_image"
_LAYERS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1")


def inputs_of(family: str) -> dict[str, Any]:
    """The arguments of the forward."""
    return make_inputs(tiny(family), **INPUTS[family])


def lora() -> dict[str, torch.Tensor]:
    """A LoRA of linears of every style."""
    shapes = tiny(PATCHED_FAMILY).table.file_tensors
    paths = [f"transformer_blocks.0.{layer}" for layer in _LAYERS]
    return factors([(path, shapes[f"{path}.weight"]) for path in paths])


def write_case(family: str, name: str, folder: Path) -> Path:
    """The tiny file of a case."""
    whole = folder / f"{family}.safetensors"
    if not whole.exists():
        write_tiny(family, whole)
    if name == PLAIN:
        return whole
    path = folder / f"{family}_{name}.safetensors"
    return path if path.exists() else write_quantised(whole, path, name)


@cache
def reference(family: str, name: str, patched: bool = False) -> torch.Tensor:
    """What ComfyUI computes."""
    with safe_open(FILE, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(_key(family, name, patched))
    return found


def _key(family: str, name: str, patched: bool) -> str:
    return f"{family} {name}{' patched' if patched else ''}"


def _make() -> None:
    from importlib.metadata import version

    from support.native import import_comfy, native_patcher

    import_comfy()
    import comfy.sd
    import comfyui_version

    packages = ("torch", "comfy-kitchen")
    made_with = {"ComfyUI": comfyui_version.__version__} | {
        name: version(name) for name in packages
    }
    results: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        cases = [*((family, PLAIN) for family in INPUTS), *CASES]
        todo = [(family, name, False) for family, name in cases]
        todo[10:10] = [(PATCHED_FAMILY, name, True) for name in (PLAIN, *PATCHED)]
        for family, name, patched in todo:
            patcher = native_patcher(write_case(family, name, Path(folder)))
            if patched:
                patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora(), STRENGTH, 0)
                patcher.load(torch.device("cpu"), full_load=True)
            inputs = inputs_of(family)
            model = patcher.model.diffusion_model
            found = model(inputs.pop("x"), inputs.pop("timesteps"), **inputs)
            exact = results.get(_key(family, PLAIN, patched), found)
            error = ((found - exact).norm() / exact.norm()).item()
            print(f"{_key(family, name, patched):32} {error:.4f} from plain", flush=True)
            results[_key(family, name, patched)] = found.float().contiguous()
            FILE.parent.mkdir(exist_ok=True)
            save_file(results, FILE, metadata={"made_with": json.dumps(made_with)})
    print(f"{FILE}: {FILE.stat().st_size} bytes, {made_with}")


if __name__ == "__main__":
    sys.argv = sys.argv[:1]  # ComfyUI reads them, too
    _make()
