"""A LoRA on every weight of every family's model: what a file computes that has it in its weights.

ComfyUI's own arithmetic makes that file, which needs no class of the model: families that the
ComfyUI of the tests does not know are among them. `test_lora.py` has every kind of patch on every
style of layer, against ComfyUI's own models.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from parity.conftest import Remote, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.inputs import make_inputs
from support.lora_files import factors
from support.ltx2_inputs import make_ltx2_inputs
from support.minimax_payloads import VIDEO, keyframe, payload
from support.native import import_comfy
from support.pack import pack_module
from support.random_numbers import normal
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import CheckpointInfo
from tp_runtime.models import families

pytestmark = pytest.mark.process

STRENGTH = 0.8
_PICTURE: dict[str, Any] = {"height": 8, "width": 6, "length": 9}
INPUTS: dict[str, dict[str, Any]] = {
    "z_image": _PICTURE | {"num_tokens": 9},
    "wan": _PICTURE | {"frames": 3, "time_scale": 1000.0},
    "minimax_h3": VIDEO | {"minimax_payload": payload([keyframe(0, 1)])},
    "ltx2": {"first": 0.0, "frames": 5, "guides": 2, "strengths": (0.5, 1.0), "reference": 3},
}
# Models with layers that the family's tiny one has not: family, and changes of its sizes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Wan Animate": (
        "wan",
        {"num_blocks": 5, "in_channels": 36, "image_dim": 1280, "has_faces": True},
    ),
}
INPUTS["Wan Animate"] = INPUTS["wan"] | {"lengths": {"pose frames": 2, "face frames": 1}}
# Family → sizes at which heads are padded: 30 to 32, 24 to 25, 20 to 21, 8 to 9.
PADDED = {"z_image": 4, "wan": 3, "minimax_h3": 3, "ltx2": 3}
SIZED = [(name, size) for name in families() for size in (1, 2, PADDED.get(name, 5))]
SIZED += [("Wan Animate", size) for size in (2, PADDED["wan"])]


@pytest.fixture(scope="module")
def weights() -> Iterator[ModuleType]:
    with pack_module("nodes.weights") as module:
        yield module


def inputs_of(name: str) -> dict[str, Any]:
    family, changes = VARIANTS.get(name, (name, {}))
    make = make_ltx2_inputs if family == "ltx2" else make_inputs
    return make(tiny(family, **changes), **INPUTS.get(name, _PICTURE))


def comfyuis_patches(info: CheckpointInfo) -> dict[str, list[Any]]:
    """As ComfyUI's ModelPatcher has them: a LoRA of all matrices, changes of all other tensors."""
    import_comfy()
    import comfy.lora

    shapes = {name: tensor.shape for name, tensor in info.tensors.items() if 0 not in tensor.shape}
    matrices = [
        (name.removesuffix(".weight"), (shape[0], shape[1]))
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight")
    ]
    lora = factors(matrices, seed=3, scale=0.1)
    weights = {name for name in shapes if name.endswith(".weight")}
    alone = {  # that are no layer's
        name
        for name in shapes
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.weight" not in weights
    }
    for seed, name in enumerate(sorted(shapes.keys() - {f"{path}.weight" for path, _ in matrices})):
        layer, _, kind = name.rpartition(".")
        change = 0.05 * normal(shapes[name], torch.Generator().manual_seed(seed))
        if kind in ("weight", "bias") and name not in alone:  # as lightx2v's files call them
            end = "diff" if kind == "weight" else "diff_b"
            lora[f"diffusion_model.{layer}.{end}"] = change
        else:
            lora[f"diffusion_model.{name}.diff"] = change
    ends = (".weight", ".bias")
    layers = {f"diffusion_model.{name}".removesuffix(".weight") for name in shapes}
    to_load = {
        key: key if key.removeprefix("diffusion_model.") in shapes else f"{key}.weight"
        for key in layers
        if not key.endswith(ends) or key.removeprefix("diffusion_model.") in alone
    }
    found = comfy.lora.load_lora(lora, to_load)
    assert {key.removeprefix("diffusion_model.") for key in found} == shapes.keys()
    return {key: [(STRENGTH, patch, 1.0, None, None)] for key, patch in found.items()}


def merged(path: Path, patches: dict[str, list[Any]], merged_path: Path) -> Path:
    """The file with the patches in its weights."""
    import comfy.lora

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for key, of_one in patches.items():
        name = key.removeprefix("diffusion_model.")
        tensors[name] = comfy.lora.calculate_weight(of_one, tensors[name], key)
    save_file(tensors, merged_path, metadata=metadata)
    return merged_path


@pytest.mark.rotates(16)
@pytest.mark.parametrize(("name", "tp_size"), SIZED)
def test_as_if_it_were_in_the_file(
    tmp_path: Path, remote: Remote, weights: ModuleType, name: str, tp_size: int
) -> None:
    family, changes = VARIANTS.get(name, (name, {}))
    path = write_tiny(family, tmp_path / "plain.safetensors", **changes)
    model, inputs = remote(path, tp_size), inputs_of(name)
    before = model.evaluate(inputs)
    patches = comfyuis_patches(model.info)
    model.patch(object(), weights.patched_weights(model.info, patches))
    found = model.evaluate(inputs)
    expected = remote(merged(path, patches, tmp_path / "merged.safetensors"), tp_size)
    assert relative_error(found, expected.evaluate(inputs)) == 0
    assert relative_error(found, before) > 0.01
    model.patch(None, {})
    assert relative_error(model.evaluate(inputs), before) == 0
