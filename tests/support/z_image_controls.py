"""Tiny Fun Union ControlNets for Z-Image, and what ComfyUI's own objects compute with them.

Only newer releases of ComfyUI (0.33) have them:

    COMFYUI_PATH=CHECKOUT PYTHON tests/support/z_image_controls.py

stores the results of every case below `tests/data`, for tests on an older one.
"""

import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # its own folder is on the path then, which is no place to import from
    TESTS = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(TESTS), str(TESTS.parent)]

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.native import import_comfy, native_model
from support.paths import REPOSITORY, comfyui_path
from support.random_numbers import on_every_cpu
from support.tiny_models import tiny, write
from tp_runtime.models.z_image.model_patch import UnionControl

DATA = REPOSITORY / "tests" / "data" / "z_image_controls_of_newer_comfyui.safetensors"
# ComfyUI spreads the control layers over 30 of the model's.
SIZES = tiny("z_image", num_heads=6, head_dim=48, ffn_dim=768, num_layers=30, time_dim=288)
# With heads that four ranks have to pad.
PADDED = tiny("z_image", num_heads=15, head_dim=32, ffn_dim=1280, num_layers=11, time_dim=480)
KIND = "ZImage_Control"

cached_native_model = functools.lru_cache(maxsize=1)(native_model)

# Release of the ControlNet → arguments of ComfyUI's class.
RELEASES: dict[str, dict[str, Any]] = {
    "1": {"n_control_layers": 6},
    "2.1": {"n_control_layers": 15, "additional_in_dim": 17, "refiner_control": True},
    "2.1 lite": {"n_control_layers": 3, "additional_in_dim": 17, "refiner_control": True},
    "2.0": {
        "n_control_layers": 15,
        "additional_in_dim": 17,
        "refiner_control": True,
        "broken": True,
    },
}


@dataclass(frozen=True)
class Case:
    """`controls`: release, strength, and how many items the latent of its picture has."""

    controls: tuple[tuple[str, float, int], ...]
    batch: int = 1
    size: tuple[int, int] = (16, 16)
    length: int = 20
    sizes: Any = SIZES


CASES = {
    "1": Case((("1", 1.0, 1),)),
    "2.1": Case((("2.1", 1.0, 1),)),
    "2.1 lite": Case((("2.1 lite", 0.6, 1),), size=(8, 24)),
    "2.0": Case((("2.0", 0.8, 1),)),
    "odd sizes, of tokens that are padded": Case((("1", 0.7, 1),), size=(17, 13)),
    "one picture for a batch": Case((("2.1 lite", 1.0, 1),), batch=3, size=(8, 12)),
    "a picture for each": Case((("1", -0.5, 2),), batch=2, size=(10, 12)),
    "two at once": Case((("1", 0.8, 1), ("2.1", 1.3, 1)), batch=2),
    "strength 0": Case((("2.1 lite", 0.0, 1),)),
    "1, padded": Case((("1", 1.0, 1),), size=(8, 10), sizes=PADDED),
    "2.1, padded": Case((("2.1", 0.9, 1),), size=(8, 8), sizes=PADDED),
}


def write_model(path: Path, sizes: Any = SIZES) -> Path:
    """The tiny Z-Image that they are for, without what newer releases leave out."""
    return write(path, sizes.table.file_tensors, numbers=on_every_cpu)


def sizes_of(release: str, sizes: Any = SIZES) -> UnionControl:
    """The sizes of a tiny ControlNet for a model of these."""
    arguments = RELEASES[release]
    channels = 16 + arguments.get("additional_in_dim", 0)
    layers, refined = arguments["n_control_layers"], "refiner_control" in arguments
    return UnionControl(sizes.num_heads, sizes.head_dim, sizes.ffn_dim, layers, channels, refined)


def tensors_of(release: str, seed: int = 0, sizes: Any = SIZES) -> dict[str, torch.Tensor]:
    """Its random weights, by ComfyUI's names."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = {}
    for name, shape in sizes_of(release, sizes).table.file_tensors.items():
        numbers = on_every_cpu(shape, generator)
        if "norm" in name:
            found[name] = 1 + 0.1 * numbers
        else:
            found[name] = numbers * (shape[1] ** -0.5 if len(shape) > 1 else 0.1)
    return found


def inputs_of(name: str) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The arguments of the model's forward, and the latents of the pictures."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    height, width = case.size
    inputs = {
        "x": on_every_cpu((case.batch, 16, height, width), generator),
        "timesteps": torch.linspace(0.25, 0.75, case.batch),
        "context": on_every_cpu((case.batch, case.length, case.sizes.context_dim), generator),
        "transformer_options": {},
    }
    even = height + height % 2, width + width % 2
    hints = [
        on_every_cpu((items, sizes_of(release).in_channels, *even), generator)
        for release, _, items in case.controls
    ]
    return inputs, hints


def is_known() -> bool:
    """Whether the ComfyUI that is tested has them."""
    return (comfyui_path() / "comfy" / "ldm" / "lumina" / "controlnet.py").exists()


def small_model(release: str, seed: int = 0, sizes: Any = SIZES) -> Any:
    """ComfyUI's own module."""
    import_comfy()
    import comfy.ops
    from comfy.ldm.lumina.controlnet import ZImage_Control

    heads = {"n_heads": sizes.num_heads, "n_kv_heads": sizes.num_heads}
    found = ZImage_Control(
        dim=sizes.dim, operations=comfy.ops.disable_weight_init, **heads, **RELEASES[release]
    )
    found.load_state_dict(tensors_of(release, seed, sizes))
    return found.requires_grad_(False)


def native(path: Path, name: str) -> torch.Tensor:
    """What ComfyUI's own model, of that file, and objects compute of a case."""
    from comfy_extras.nodes_model_patch import ZImageControlPatch

    inputs, hints = inputs_of(name)
    patches = []
    for seed, ((release, strength, _), hint) in enumerate(
        zip(CASES[name].controls, hints, strict=True)
    ):
        patch = object.__new__(ZImageControlPatch)
        patch.model_patch = SimpleNamespace(model=small_model(release, seed, CASES[name].sizes))
        patch.vae = SimpleNamespace(spacial_compression_encode=lambda: 8)
        patch.strength, patch.temp_data, patch.encoded_image = strength, None, hint
        patch.encoded_image_size = tuple(8 * side for side in hint.shape[-2:])
        patches.append(patch)
    inputs["transformer_options"]["patches"] = {"noise_refiner": patches, "double_block": patches}
    x, timesteps = inputs.pop("x"), inputs.pop("timesteps")
    with torch.inference_mode():
        found: torch.Tensor = cached_native_model(path)(x, timesteps, num_tokens=None, **inputs)
    return found


def expected(path: Path, name: str) -> torch.Tensor:
    """The same; as it was stored, where the running ComfyUI has no such class."""
    if is_known():
        return native(path, name)
    with safe_open(DATA, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found


def main() -> None:
    """Write the file."""
    sys.argv = sys.argv[:1]  # ComfyUI reads them, too
    import_comfy()
    from comfyui_version import __version__

    about = {"comfyui": __version__, "torch": torch.__version__, "made_by": Path(__file__).name}
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name, case in CASES.items():
            path = Path(folder) / f"{case.sizes.num_heads}.safetensors"
            if not path.exists():
                write_model(path, case.sizes)
            results[name] = native(path, name).contiguous()
    save_file(results, DATA, metadata=about)
    print(f"{DATA}: {len(results)} results, {DATA.stat().st_size} bytes")


if __name__ == "__main__":
    main()
