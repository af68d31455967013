"""What ComfyUI 0.33 computes with tiny quantised files: which files, on which inputs, and where the
results are kept (`tests/data/quantised_references.safetensors`).

`python -m support.quantised_references` makes that file, in the Python of a ComfyUI which knows the
formats and with `COMFYUI_PATH` at its source (`CONTRIBUTING.md`). The results are of fp32.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.inputs import make_inputs
from support.lora_files import factors
from support.minimax_payloads import VIDEO
from support.newer_references import MAKERS
from support.paths import REPOSITORY
from support.quantised_files import FORMATS, as_held, write_quantised
from support.random_numbers import on_every_cpu
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
    "krea2": _PICTURE,
    "minimax_h3": VIDEO,
    "ltx2": {"first": 0.0},
}
# Every family in the format that most people download; two of them in the others, one with q, k and
# v in one tensor.
CASES = [
    *((family, "int8_convrot") for family in INPUTS),
    *(("qwen_image", name) for name in FORMATS if name != "int8_convrot"),
    *(("flux", name) for name in ("fp8", "nvfp4_awq", "w4a8", "int8_convrot_64")),
    *((family, "fp8") for family in ("krea2", "minimax_h3", "ltx2")),
]
PATCHED = tuple(FORMATS)
PATCHED_FAMILY = "qwen_image"
_LAYERS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2", "img_mod.1")


def inputs_of(family: str) -> dict[str, Any]:
    """The arguments of the forward."""
    return MAKERS.get(family, make_inputs)(tiny(family), **INPUTS[family])


def lora() -> dict[str, torch.Tensor]:
    """A LoRA of linears of every style."""
    shapes = tiny(PATCHED_FAMILY).table.file_tensors
    layers = [(path, shapes[f"{path}.weight"]) for path in patched_layers()]
    found = factors(layers, numbers=on_every_cpu)
    return {key: (value * 1024).round() / 1024 for key, value in found.items()}  # few bits


def write_case(family: str, name: str, folder: Path) -> Path:
    """The tiny file of a case."""
    whole = folder / f"{family}.safetensors"
    if not whole.exists():
        write_tiny(family, whole, numbers=on_every_cpu)
    if name == PLAIN:
        return whole
    path, table = folder / f"{family}_{name}.safetensors", tiny(family).table
    # What a model computes in fp32 is not quantised in published files either.
    keep = {table.places[parameter].name.removesuffix(".weight") for parameter in table.exact}
    return path if path.exists() else write_quantised(whole, path, name, keep=keep)


@cache
def reference(family: str, name: str, patched: bool = False) -> Any:
    """What ComfyUI computes: a tensor, or a list of them."""
    key = _key(family, name, patched)
    with safe_open(FILE, framework="pt") as file:
        if key in file.keys():  # noqa: SIM118  (not a dict)
            return file.get_tensor(key)
        parts = sorted(one for one in file.keys() if one.startswith(f"{key}, "))  # noqa: SIM118
        return [file.get_tensor(part) for part in parts]


def patched_layers() -> list[str]:
    """Those that `lora` changes."""
    return [f"transformer_blocks.0.{layer}" for layer in _LAYERS]


def digest(held: Mapping[str, torch.Tensor]) -> str:
    """Of a weight as ranks hold it, bit by bit."""
    found = hashlib.sha256()
    for kind, tensor in sorted(held.items()):
        found.update(f"{kind} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def digests(name: str) -> dict[str, str]:
    """Of the weights that ComfyUI makes of a patched file's quantised layers, by layer.

    Of a format that rotates, they are those of the CPU that `_make` ran on: sums of floats, whose
    last bit may tip a rounding.
    """
    with safe_open(FILE, framework="pt") as file:
        found: dict[str, str] = json.loads(file.metadata()[_DIGESTS])[name]
    return found


def digests_here(name: str, folder: Path) -> dict[str, str]:
    """The same by the ComfyUI that is tested, on this CPU."""
    return _digests_of(_patched(write_case(PATCHED_FAMILY, name, folder)))


_DIGESTS = "digests"


def _key(family: str, name: str, patched: bool) -> str:
    return f"{family} {name}{' patched' if patched else ''}"


def _patched(path: Path) -> Any:
    """ComfyUI's model of a file, with the LoRA in its weights."""
    from support.native import import_comfy, native_patcher

    import_comfy()
    import comfy.sd

    patcher, _ = comfy.sd.load_lora_for_models(native_patcher(path), None, lora(), STRENGTH, 0)
    patcher.load(torch.device("cpu"), full_load=True)
    return patcher.model.diffusion_model


def _digests_of(model: torch.nn.Module) -> dict[str, str]:
    found = {}
    for layer in patched_layers():
        tensors = model.get_submodule(layer).state_dict()
        tensors.pop("bias", None)
        if (said := tensors.pop("comfy_quant", None)) is not None:
            _, held = as_held(tensors, json.loads(said.numpy().tobytes()))
            found[layer] = digest(held)
    return found


def _make() -> None:
    from importlib.metadata import version

    from support.native import import_comfy, native_patcher

    import_comfy()
    import comfyui_version

    packages = ("torch", "comfy-kitchen")
    made_with = {"ComfyUI": comfyui_version.__version__} | {
        name: version(name) for name in packages
    }
    results: dict[str, torch.Tensor] = {}
    of_patched: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        cases = [*((family, PLAIN) for family in INPUTS), *CASES]
        todo = [(family, name, False) for family, name in cases]
        todo += [(PATCHED_FAMILY, name, True) for name in (PLAIN, *PATCHED)]
        for family, name, patched in todo:
            path = write_case(family, name, Path(folder))
            model = _patched(path) if patched else native_patcher(path).model.diffusion_model
            if patched:
                of_patched[name] = _digests_of(model)
            inputs = inputs_of(family)
            x, timesteps = inputs.pop("x"), inputs.pop("timesteps")
            if "a_timestep" in inputs:
                timesteps = timesteps, inputs.pop("a_timestep")
            found = model(x, timesteps, **inputs)
            key, plain = _key(family, name, patched), _key(family, PLAIN, patched)
            if isinstance(found, torch.Tensor):
                keys, parts = {key: plain}, [found]
            else:
                keys, parts = {f"{key}, {n}": f"{plain}, {n}" for n in range(len(found))}, found
            for (one, before), part in zip(keys.items(), parts, strict=True):
                exact = results.get(before, part)
                error = ((part - exact).norm() / exact.norm()).item()
                print(f"{one:40} {error:.4f} from plain", flush=True)
                results[one] = part.float().contiguous()
    FILE.parent.mkdir(exist_ok=True)
    about = {"made_with": json.dumps(made_with), _DIGESTS: json.dumps(of_patched)}
    save_file(results, FILE, metadata=about)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {made_with}")


if __name__ == "__main__":
    sys.argv = sys.argv[:1]  # ComfyUI reads them, too
    _make()
