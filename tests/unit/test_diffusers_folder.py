"""Diffusers folders: read exactly as the ComfyUI file of the same weights is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.diffusers_folders import FAMILIES, INDEX, WEIGHTS, write_folder
from tp_runtime.client import CheckpointError, ModelSpec, inspect_checkpoint
from tp_runtime.recognise import open_checkpoint


def message_for(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(str(path))
    return str(caught.value)


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_reads_as_the_comfyui_file(tmp_path: Path, family: str, num_shards: int) -> None:
    file = FAMILIES[family].write(tmp_path / "model.safetensors")
    folder = write_folder(file, tmp_path / "folder", family, num_shards)
    expected = load_file(file)
    expected.pop("norm_final.weight", None)  # diffusers has none; nothing uses it
    info, info_of_file = inspect_checkpoint(str(folder)), inspect_checkpoint(str(file))
    assert (info.family, info.sizes) == (info_of_file.family, info_of_file.sizes)
    assert info.tensors.keys() == expected.keys()
    with open_checkpoint(str(folder)) as opened:
        for name, tensor in expected.items():
            found = opened.read(name, None, None)
            assert info.tensors[name] == info_of_file.tensors[name]
            assert torch.equal(found, tensor), name
        assert opened.bytes_read == sum(tensor.nbytes for tensor in expected.values())


@pytest.mark.parametrize(
    "name",
    ["double_blocks.1.img_attn.qkv.weight", "final_layer.adaLN_modulation.1.weight"],
)
@pytest.mark.parametrize("rows", [(0, 7), (380, 390), (100, 700), (384, 768), (767, 768)])
def test_ranges_cross_the_stacked_tensors(
    whole_folder: Path, name: str, rows: tuple[int, int]
) -> None:
    with safe_open(whole_folder.parent / "flux.safetensors", framework="pt") as file:
        whole = file.get_tensor(name)
    with open_checkpoint(str(whole_folder)) as file:
        assert torch.equal(file.read(name, rows, None), whole[slice(*rows)])
        assert file.bytes_read == (rows[1] - rows[0]) * whole.shape[1] * 4
        assert torch.equal(file.read(name, rows, (3, 50)), whole[slice(*rows), 3:50])


def test_another_version_after_a_shard_was_replaced(flux_folder: Path) -> None:
    before = ModelSpec.of(str(flux_folder), "float32", "float32")
    shard = min(flux_folder.glob("*.safetensors"))
    tensors = load_file(shard)
    shard.unlink()
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
    assert ModelSpec.of(str(flux_folder), "float32", "float32") != before


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in three shards, beside the `flux.safetensors` that it was made from."""
    place = tmp_path_factory.mktemp("flux")
    file = FAMILIES["flux"].write(place / "flux.safetensors")
    return write_folder(file, place / "folder", "flux", num_shards=3)


@pytest.fixture
def flux_folder(whole_folder: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to damage."""
    return Path(shutil.copytree(whole_folder, tmp_path / "folder"))


def edit_json(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_no_weights(flux_folder: Path) -> None:
    (flux_folder / INDEX).unlink()
    assert f"has neither {WEIGHTS} nor {INDEX}" in message_for(flux_folder)


def test_a_shard_that_is_missing(flux_folder: Path) -> None:
    shard = sorted(flux_folder.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"lacks the file {shard.name}" in message_for(flux_folder)


def test_a_shard_that_was_cut_short(flux_folder: Path) -> None:
    shard = sorted(flux_folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    message = message_for(flux_folder)
    assert f"{shard} is not a whole safetensors file: it is cut short" in message


@pytest.mark.parametrize("name", ["../flux.safetensors", "/etc/passwd", "."])
def test_a_shard_outside_the_folder(flux_folder: Path, name: str) -> None:
    edit_json(flux_folder / INDEX, lambda c: c.update(weight_map={"x_embedder.weight": name}))
    assert f"lacks the file {name}" in message_for(flux_folder)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_json_that_is_none(flux_folder: Path, name: str, content: str) -> None:
    (flux_folder / name).write_text(content)
    assert f"{name} " in message_for(flux_folder)


def test_an_index_that_says_nothing(flux_folder: Path) -> None:
    (flux_folder / INDEX).write_text("{}")
    assert "does not say which tensor is in which file" in message_for(flux_folder)


def test_an_index_that_lies(flux_folder: Path) -> None:
    shard = min(flux_folder.glob("*.safetensors")).name
    edit_json(flux_folder / INDEX, lambda c: c["weight_map"].update({"more.weight": shard}))  # type: ignore[attr-defined]
    assert f"says that more.weight is in {shard}, but it is not" in message_for(flux_folder)


@pytest.mark.parametrize("name", ["MochiTransformer3DModel", None, 3, []])
def test_a_class_that_is_unknown(flux_folder: Path, name: object) -> None:
    edit_json(flux_folder / "config.json", lambda c: c.update(_class_name=name))
    message = message_for(flux_folder)
    assert f"of the class {name!r}, which cannot be split yet" in message
    assert "FluxTransformer2DModel" in message


@pytest.mark.parametrize("value", ["many", None, []])
def test_a_setting_that_is_no_size(flux_folder: Path, value: object) -> None:
    edit_json(flux_folder / "config.json", lambda c: c.update(num_layers=value))
    assert "that is no size" in message_for(flux_folder)


@pytest.mark.parametrize("value", [10**5, 10**9, 10**30])
def test_more_layers_than_there_are_tensors(flux_folder: Path, value: int) -> None:
    edit_json(flux_folder / "config.json", lambda c: c.update(num_layers=value))
    assert f"says num_layers={value}, but the folder has " in message_for(flux_folder)


def test_a_quantised_folder(flux_folder: Path) -> None:
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}}
    edit_json(flux_folder / "config.json", lambda c: c.update(quantised))
    message = message_for(flux_folder)
    assert "is quantised ({'quant_method': 'bitsandbytes'})" in message
    assert "an fp8 or GGUF file" in message


def test_scales(tmp_path: Path) -> None:
    file = FAMILIES["flux"].write(tmp_path / "flux.safetensors")
    folder = write_folder(file, tmp_path / "folder", "flux")
    tensors = load_file(folder / WEIGHTS)
    tensors["x_embedder.weight_scale"] = torch.ones(())
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    message = message_for(folder)
    assert "such as x_embedder.weight_scale. It is quantised with scales" in message


def test_a_setting_that_is_missing(flux_folder: Path) -> None:
    edit_json(flux_folder / "config.json", lambda c: c.pop("num_layers"))
    assert "lacks the setting 'num_layers'" in message_for(flux_folder)


def without(folder: Path, name: str) -> None:
    edit_json(folder / INDEX, lambda c: c["weight_map"].pop(name))  # type: ignore[attr-defined]


def test_a_tensor_that_is_missing(flux_folder: Path) -> None:
    without(flux_folder, "context_embedder.bias")
    assert "1 missing (txt_in.bias)" in message_for(flux_folder)


@pytest.mark.parametrize("which", ["to_q", "to_k", "to_v"])
def test_a_part_of_a_stack_that_is_missing(flux_folder: Path, which: str) -> None:
    without(flux_folder, f"transformer_blocks.1.attn.{which}.weight")
    message = message_for(flux_folder)
    assert "lacks a tensor: of those that make up double_blocks.1.img_attn.qkv.weight" in message


def test_a_tensor_that_nothing_uses(flux_folder: Path) -> None:
    edit_json(flux_folder / "config.json", lambda c: c.update(num_layers=1))
    assert "tensors that FLUX.1 has not, such as transformer_blocks.1." in message_for(flux_folder)


def test_a_variant_that_computes_differently(tmp_path: Path) -> None:
    file = FAMILIES["qwen_image"].write(tmp_path / "model.safetensors")
    folder = write_folder(file, tmp_path / "folder", "qwen_image")
    edit_json(folder / "config.json", lambda c: c.update(zero_cond_t=True))
    assert "This is Qwen-Image-Edit-2511 as a diffusers folder" in message_for(folder)
