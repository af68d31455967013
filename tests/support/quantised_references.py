"""What ComfyUI 0.33 computes with tiny quantised files: which files, on which inputs, and where the
results are kept (`tests/data/quantised_references*.safetensors`).

`python -m support.quantised_references [FILE ...]` makes those files, or some, in the Python of a
ComfyUI which knows the formats and with `COMFYUI_PATH` at its source (`CONTRIBUTING.md`). The
results are of fp32.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
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
from support.random_numbers import on_every_cpu
from support.tiny_models import tiny, write_tiny

DATA = REPOSITORY / "tests" / "data"
FILE = "quantised_references.safetensors"
# Families that came later have files of their own.
OWN_FILES = {name: f"quantised_references_{name}.safetensors" for name in ("krea2", "ltx2")}
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
    "ltx2": {"frames": 2, "height": 2, "width": 3, "length": 9, "lengths": {"sound frames": 5}},
    "krea2": _PICTURE,
}
# Every family in the format that most people download; two of them in the others, one with q, k and
# v in one tensor.
CASES = [
    *((family, "int8_convrot") for family in INPUTS),
    *(("qwen_image", name) for name in FORMATS if name != "int8_convrot"),
    *(("flux", name) for name in ("fp8", "nvfp4_awq", "w4a8")),
    ("ltx2", "fp8"),
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
    layers = [(path, shapes[f"{path}.weight"]) for path in paths]
    found = factors(layers, numbers=on_every_cpu)
    return {key: (value * 1024).round() / 1024 for key, value in found.items()}  # few bits


def write_case(family: str, name: str, folder: Path) -> Path:
    """The tiny file of a case."""
    whole = folder / f"{family}.safetensors"
    if not whole.exists():
        write_tiny(family, whole, numbers=on_every_cpu)
    if name == PLAIN:
        return whole
    path = folder / f"{family}_{name}.safetensors"
    return path if path.exists() else write_quantised(whole, path, name)


@cache
def reference(family: str, name: str, patched: bool = False) -> Any:
    """What ComfyUI computes: a tensor, or a list of them."""
    key = _key(family, name, patched)
    with safe_open(DATA / OWN_FILES.get(family, FILE), framework="pt") as file:
        if key in file.keys():  # noqa: SIM118  (not a dict)
            return file.get_tensor(key)
        parts = sorted(part for part in file.keys() if part.startswith(f"{key}, "))  # noqa: SIM118
        return [file.get_tensor(part) for part in parts]


def _key(family: str, name: str, patched: bool) -> str:
    return f"{family} {name}{' patched' if patched else ''}"


def _make(files: Sequence[str]) -> None:
    from importlib.metadata import version

    from support.native import import_comfy, native_patcher

    import_comfy()
    import comfy.sd
    import comfyui_version

    packages = ("torch", "comfy-kitchen")
    made_with = {"ComfyUI": comfyui_version.__version__} | {
        name: version(name) for name in packages
    }
    results: dict[str, dict[str, torch.Tensor]] = {name: {} for name in files}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        cases = [*((family, PLAIN) for family in INPUTS), *CASES]
        todo = [(family, name, False) for family, name in cases]
        todo[10:10] = [(PATCHED_FAMILY, name, True) for name in (PLAIN, *PATCHED)]
        for family, name, patched in todo:
            of_file = OWN_FILES.get(family, FILE)
            if of_file not in results:
                continue
            patcher = native_patcher(write_case(family, name, Path(folder)))
            if patched:
                patcher, _ = comfy.sd.load_lora_for_models(patcher, None, lora(), STRENGTH, 0)
                patcher.load(torch.device("cpu"), full_load=True)
            inputs = inputs_of(family)
            model = patcher.model.diffusion_model
            x, timesteps = inputs.pop("x"), inputs.pop("timesteps")
            if "a_timestep" in inputs:  # BaseModel gives both at once
                timesteps = timesteps, inputs.pop("a_timestep")
            found = model(x, timesteps, **inputs)
            parts = found if isinstance(found, list) else [found]
            for index, part in enumerate(parts):
                of_part = f", {index}" * isinstance(found, list)
                exact = results[of_file].get(_key(family, PLAIN, patched) + of_part, part)
                error = ((part - exact).norm() / exact.norm()).item()
                key = _key(family, name, patched) + of_part
                print(f"{key:32} {error:.4f} from plain", flush=True)
                results[of_file][key] = part.float().contiguous()
    for of_file, found_there in results.items():
        save_file(found_there, DATA / of_file, metadata={"made_with": json.dumps(made_with)})
        print(f"{of_file}: {(DATA / of_file).stat().st_size} bytes, {made_with}")


if __name__ == "__main__":
    asked = sys.argv[1:] or [FILE, *OWN_FILES.values()]
    sys.argv = sys.argv[:1]  # ComfyUI reads them, too
    _make(asked)
