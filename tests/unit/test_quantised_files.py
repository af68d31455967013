"""Quantised files from their headers: what is in them, what cannot be, and how they are split."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.quantised_files import FORMATS, ROTATION, write_quantised
from support.sparse_files import one_block, write_sparse
from support.tiny_models import tiny_shapes, write_tiny
from tp_runtime.client import CheckpointError, inspect_checkpoint
from tp_runtime.models import family_named
from tp_runtime.tools.cli import main
from tp_runtime.tools.footprint import model_footprint

Tensors = dict[str, torch.Tensor]
LAYER = "transformer_blocks.0.attn.to_k"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "whole.safetensors"
    return write_tiny("qwen_image", path, **one_block("qwen_image"))


def others() -> set[str]:
    """All layers but one."""
    names = tiny_shapes("qwen_image", **one_block("qwen_image"))
    return {name.removesuffix(".weight") for name in names} - {LAYER}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_what_it_was_before_quantising(whole: Path, tmp_path: Path, name: str) -> None:
    path = write_quantised(
        whole, tmp_path / "q.safetensors", name, saying="metadata", keep=others()
    )
    found, plain = inspect_checkpoint(str(path)), inspect_checkpoint(str(whole))
    assert found.sizes == plain.sizes
    assert {k: t.shape for k, t in found.tensors.items()} == {
        k: t.shape for k, t in plain.tensors.items()
    }
    assert list(found.quantised) == [f"{LAYER}.weight"]
    assert found.metadata == plain.metadata
    assert found.weight_bytes(4) < plain.weight_bytes(4) - 2 * 384 * 384


SCALED = torch.zeros(0, dtype=torch.float8_e4m3fn)  # the marker's values


@pytest.mark.parametrize("saying", ["comfy_quant", "metadata"])
def test_a_described_file_with_the_marker_of_scaled_ones(
    whole: Path, tmp_path: Path, saying: Any
) -> None:
    """Converters put it into every fp8 file."""
    path = write_quantised(whole, tmp_path / "q.safetensors", "fp8", saying=saying)
    described = inspect_checkpoint(str(path))
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors | {"scaled_fp8": SCALED}, path, metadata=metadata)
    found = inspect_checkpoint(str(path))
    assert found.quantised == described.quantised
    assert not found.extra


@pytest.mark.parametrize("marker", ["scaled_fp8", "model.diffusion_model.scaled_fp8"])
def test_a_scaled_file_with_the_marker_in_either_place(
    whole: Path, tmp_path: Path, marker: str
) -> None:
    """And with a layer that is described besides: both kinds count."""
    path = write_quantised(whole, tmp_path / "q.safetensors", "fp8")
    layers = inspect_checkpoint(str(path)).quantised.keys()
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    scaled = {}
    for key, value in tensors.items():
        if not key.startswith(LAYER):
            if key.endswith((".comfy_quant", ".input_scale")):
                continue
            key = key.replace(".weight_scale", ".scale_weight")
        scaled[f"model.diffusion_model.{key}"] = value
    save_file(scaled | {marker: SCALED}, path)
    found = inspect_checkpoint(str(path))
    assert found.quantised.keys() == layers
    assert found.quantised[f"{LAYER}.weight"].tensors["weight_scale"] == f"{LAYER}.weight_scale"
    assert not found.extra


def change_of(
    name: str, change: Callable[[Tensors, dict[str, Any]], object]
) -> Callable[[Path, Path], Path]:
    """What writes a file in a format with one layer, and what the file says of it, changed."""

    def write(whole: Path, path: Path) -> Path:
        write_quantised(whole, path, name, keep=others())
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = json.loads(tensors[f"{LAYER}.comfy_quant"].numpy().tobytes())
        change(tensors, said)
        text = json.dumps(said).encode()
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        save_file(tensors, path)
        return path

    return write


def lacks(suffix: str) -> Callable[[Tensors, dict[str, Any]], object]:
    return lambda tensors, _: tensors.pop(f"{LAYER}.{suffix}")


def has(suffix: str, tensor: torch.Tensor) -> Callable[[Tensors, dict[str, Any]], object]:
    return lambda tensors, _: tensors.update({f"{LAYER}.{suffix}": tensor})


def says(**what: Any) -> Callable[[Tensors, dict[str, Any]], object]:
    return lambda _, said: said.update(what)


BAD = {
    "unknown format": ("int8", says(format="int3"), f"layer {LAYER} has the format 'int3'"),
    "format is no word": ("int8", says(format=3), "how it is quantised"),
    "no scale": ("int8", lacks("weight_scale"), "lacks the scales"),
    "scale of too few rows": ("int8", has("weight_scale", torch.ones(7, 1)), r"\[7, 1\]; \[\]"),
    "scale of columns": ("int8", has("weight_scale", torch.ones(1, 384)), r"\[1, 384\]"),
    "scale in int32": (
        "int8",
        has("weight_scale", torch.ones(384, 1, dtype=torch.int32)),
        "stored as I32",
    ),
    "weight in bf16": (
        "int8",
        has("weight", torch.zeros(384, 384, dtype=torch.bfloat16)),
        "weight is BF16",
    ),
    "weight of three axes": (
        "int8",
        has("weight", torch.zeros(384, 384, 1, dtype=torch.int8)),
        r"\[384, 384, 1\]",
    ),
    "group does not divide": (
        "int8_convrot",
        says(convrot_groupsize=256),
        "group of 256 columns does not divide its 384 columns",
    ),
    "group is no power of 4": ("int8_convrot", says(convrot_groupsize=32), "no power of 4"),
    "group is no size": ("int8_convrot", says(convrot_groupsize="16"), "which is no size"),
    "group of a w4a4": (
        "w4a4",
        says(params={"convrot_groupsize": 256}),
        "does not divide its 384 columns",
    ),
    "block does not divide": ("w4a8", says(group_size=256), "does not divide its 384 columns"),
    "no scales of blocks": ("nvfp4", lacks("weight_scale"), "lacks the scales"),
    "no scale of all": ("nvfp4", lacks("weight_scale_2"), "weight_scale_2"),
    "too few scales of blocks": (
        "mxfp8",
        has("weight_scale", torch.zeros(384, 8, dtype=torch.uint8)),
        r"\[384, 8\]; \[384, 12\]",
    ),
    "smooth scale of rows": ("nvfp4_awq", has("pre_quant_scale", torch.ones(7)), r"\[7\]; \[384\]"),
    "codebook of 8": ("w4a8", has("weight_codebook", torch.ones(8)), r"\[8\]; \[16\]"),
    "another width": (
        "int8",
        lambda t, _: t.update(
            {
                f"{LAYER}.weight": torch.zeros(384, 400, dtype=torch.int8),
            }
        ),
        r"\[384, 400\], not \[384, 384\]",
    ),
}


@pytest.mark.parametrize(("name", "change", "words"), BAD.values(), ids=BAD)
def test_a_bad_file_is_one_clear_error(
    whole: Path, tmp_path: Path, name: str, change: Any, words: str
) -> None:
    path = change_of(name, change)(whole, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=words) as error:
        inspect_checkpoint(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_file(whole: Path, tmp_path: Path) -> None:
    path = write_quantised(whole, tmp_path / "q.safetensors", "nvfp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        inspect_checkpoint(str(path))


def published(family: str, tmp_path: Path) -> Path:
    """An int8_convrot file of a published model, without values: blocks in groups of 256."""
    tensors: Tensors = {}
    said = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256})
    for name, shape in family_named(family).published.table.file_tensors.items():
        layer = name.removesuffix(".weight")
        in_blocks = "blocks." in name or "layers." in name
        if not in_blocks or len(shape) != 2 or layer == name or shape[1] % 256:
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            continue
        tensors[name] = torch.empty(shape, dtype=torch.int8, device="meta")
        tensors[f"{layer}.weight_scale"] = torch.empty(shape[0], 1, device="meta")
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(said.encode()), dtype=torch.uint8)
    write_sparse(tmp_path / "published.safetensors", tensors)
    return tmp_path / "published.safetensors"


ATTENTION = "its cuts do not fall on groups of 256 columns"
# Family → what ends an attention, and the sizes at which heads and groups do not fit.
UNEVEN = {
    "z_image": (("attention.to_out.0",), (2, 6)),
    "flux": (("attn.to_out.0", "attn.to_add_out", "proj_out"), (5, 8)),
    "flux2": (("attn.to_out.0", "attn.to_add_out", "attn.to_out"), (7,)),
    "krea2": (("attn.to_out.0",), (3, 4, 7, 8)),  # some of them of the text's blocks only
    "qwen_image": (("attn.to_out.0", "attn.to_add_out"), (5, 8)),
    "qwen_image_21": (("attn.to_out.0",), (3, 5, 7)),
    "wan": (("to_out.0",), (6, 8)),
    "minimax_h3": (("attn.to_out.0",), (3, 8)),
}


@pytest.mark.parametrize("family", UNEVEN)
def test_only_the_end_of_an_attention_is_dequantised(family: str, tmp_path: Path) -> None:
    endings, uneven = UNEVEN[family]
    info = inspect_checkpoint(str(published(family, tmp_path)))
    file = info.weight_bytes(2)
    for tp_size in info.valid_tp_sizes():
        found = model_footprint(info, tp_size)
        dequantised = found.quantisation.dequantised
        assert bool(dequantised) == (tp_size in uneven), (tp_size, list(dequantised)[:3])
        assert all(path.endswith(endings) for path in dequantised)
        assert set(dequantised.values()) <= {ATTENTION}
        held = max(share.held_bytes for share in found.shares)
        if tp_size in (1, 2, 4) and not dequantised:
            assert held <= 1.03 * file / tp_size, tp_size


def test_plan_shows_formats(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_quantised(
        whole,
        tmp_path / "q.safetensors",
        "int8_convrot",
        keep={"img_in"},
        others={"transformer_blocks.0.img_mlp.net.2": "nvfp4", LAYER: "fp8"},
    )
    assert main(["plan", str(path), "--tp", "8"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    label = f"int8_tensorwise+convrot{ROTATION}"
    assert label in lines["transformer_blocks.0.attn.to_out.0"]
    of_nvfp4 = r"nvfp4 +rows, blocks of 16 +dequantised at every use"
    assert re.search(of_nvfp4, lines["transformer_blocks.0.img_mlp.net.2"])
    assert "stored differently" in lines["transformer_blocks.0.attn.to_qkv"]
    assert " plain " in lines["img_in"]
    assert "each rank:" in shown
    assert "1 layer is held dequantised" in shown


@pytest.mark.parametrize("prefix", ["net.", "model.model.", "model.diffusion_model.", ""])
def test_metadata_may_name_layers_with_the_prefix(whole: Path, tmp_path: Path, prefix: str) -> None:
    path = write_quantised(
        whole, tmp_path / "q.safetensors", "fp8", saying="metadata", keep=others()
    )
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["_quantization_metadata"])
    described["layers"] = {f"{prefix}{name}": what for name, what in described["layers"].items()}
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"_quantization_metadata": json.dumps(described)})
    assert list(inspect_checkpoint(str(path)).quantised) == [f"{LAYER}.weight"]


def test_what_only_linears_have_beside_another_weight_is_left_out(tmp_path: Path) -> None:
    """As by a converter that writes a scale for everything."""
    whole = write_tiny("wan", tmp_path / "whole.safetensors", num_blocks=1)
    path = write_quantised(
        whole, tmp_path / "q.safetensors", "fp8", saying="comfy_quant", keep={"head.head"}
    )
    tensors = load_file(path)
    said = next(tensor for name, tensor in tensors.items() if name.endswith(".comfy_quant"))
    beside = {
        "patch_embedding.comfy_quant": said.clone(),
        "patch_embedding.weight_scale": torch.ones(1),
    }
    before = inspect_checkpoint(str(path))
    save_file(tensors | beside, path)
    found = inspect_checkpoint(str(path))
    assert "patch_embedding.weight" not in found.quantised
    assert found.quantised.keys() == before.quantised.keys()
    # Of a linear that is not stored so, a scale says that something is wrong.
    name = "head.head.weight"
    wrong = {"head.head.comfy_quant": said.clone(), "head.head.weight_scale": torch.ones(1)}
    assert name not in found.quantised
    save_file(tensors | wrong, path)
    with pytest.raises(CheckpointError, match=r"head\.head.*Choose another file, or load it"):
        inspect_checkpoint(str(path))


@pytest.mark.parametrize("config", ["a: yaml", "[1, 2]", '"text"'])
def test_what_another_program_keeps_in_the_metadata(
    whole: Path, tmp_path: Path, config: str
) -> None:
    """ComfyUI looks at it for a few models only."""
    path = tmp_path / "trained.safetensors"
    save_file(load_file(whole), path, metadata={"config": config})
    assert inspect_checkpoint(str(path)).sizes == inspect_checkpoint(str(whole)).sizes
    told = tmp_path / "wan.safetensors"
    tensors = load_file(write_tiny("wan", told, num_blocks=1))
    save_file(tensors, told, metadata={"config": config})
    with pytest.raises(CheckpointError, match="metadata that do not fit"):
        inspect_checkpoint(str(told))
