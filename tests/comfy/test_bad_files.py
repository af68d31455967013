"""Model files that cannot be used: one clear error of the loader, and all else goes on."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.comfy_history import PromptError
from support.comfy_server import ComfyServer
from support.diffusers_folders import INDEX, write_folder
from support.gguf_files import write_gguf
from support.sparse_files import one_block
from support.tiny_models import write, write_fp8, write_tiny
from support.workflows import tp_loader, tp_text_to_latent, with_report

pytestmark = [pytest.mark.comfy, pytest.mark.rotates(5)]

Works = Callable[[], list[int]]
Tensors = dict[str, torch.Tensor]

NAME = "bad.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good file: one block of each kind. Made once, like those in other formats below."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    return write_tiny("z_image", path, **one_block("z_image"))


@pytest.fixture(scope="module")
def good_fp8(good: Path) -> Path:
    return write_fp8(good, good.with_name("mixed.safetensors"), "mixed")


@pytest.fixture(scope="module")
def good_gguf(good: Path) -> Path:
    return write_gguf(good, good.with_name("good.gguf"), "Q8_0", architecture="lumina2")


@pytest.fixture(scope="module")
def good_folder(tiny_z_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in two shards."""
    folder = tmp_path_factory.mktemp("good") / "folder"
    return write_folder(tiny_z_image, folder, "z_image", num_shards=2)


@pytest.fixture
def bad(comfy_server: ComfyServer, good: Path) -> Path:
    """Where a test puts its bad file. ComfyUI has seen a good one there."""
    path = comfy_server.models / "diffusion_models" / NAME
    path.unlink(missing_ok=True)
    path.write_bytes(good.read_bytes())
    return path


@pytest.fixture
def refused(comfy_server: ComfyServer, works: Works) -> Callable[..., str]:
    """`refused(type, name)`: the loader's message about the bad file; ranks and server go on."""

    def check(error_type: str = "CheckpointError", name: str = NAME) -> str:
        pids = works()
        with pytest.raises(PromptError) as error:
            comfy_server.run(tp_text_to_latent(name))
        print(f"{error.value.type}: {error.value.message}")
        assert error.value.node_id == "model"
        assert error.value.type.endswith(error_type)
        assert name in error.value.message
        assert error.value.message.count("\n") <= 1
        assert works() == pids
        return error.value.message

    return check


def rewrite(path: Path, change: Callable[[Tensors], object]) -> None:
    """Change the tensors of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_missing(bad: Path, refused: Callable[..., str]) -> None:
    """ComfyUI 0.3.75 leaves it to the node; later ones refuse what is not in the list."""
    bad.unlink()
    assert re.search("not found|not in list", refused(""))


def test_dangling_link(bad: Path, refused: Callable[..., str]) -> None:
    """It is in ComfyUI's list of files."""
    bad.unlink()
    bad.symlink_to("nowhere.safetensors")
    assert "not found" in refused("FileNotFoundError")


def test_truncated(bad: Path, refused: Callable[..., str]) -> None:
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    assert "cut short" in refused()


def test_truncated_in_the_header(bad: Path, refused: Callable[..., str]) -> None:
    bad.write_bytes(bad.read_bytes()[:1000])
    assert "not a whole safetensors file" in refused()


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>Not found</html>" * 10])
def test_not_safetensors(bad: Path, refused: Callable[..., str], content: bytes) -> None:
    bad.write_bytes(content)
    assert "safetensors" in refused()


def test_broken_header(bad: Path, refused: Callable[..., str]) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}})
    bad.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(12))
    assert "safetensors" in refused()


def test_another_architecture(bad: Path, refused: Callable[..., str]) -> None:
    shapes = {
        "input_blocks.0.0.weight": (32, 4, 3, 3),
        "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (32, 32),
        "out.2.weight": (4, 32, 3, 3),
    }
    write(bad, shapes, prefix="model.diffusion_model.")
    message = refused()
    assert "Supported: " in message
    assert "Z-Image" in message
    assert "input_blocks.0.0.weight" in message


@pytest.mark.parametrize(
    "name",
    ["layers.0.feed_forward.w2.weight", "x_embedder.weight", "layers.0.attention.q_norm.weight"],
)
def test_missing_key(bad: Path, refused: Callable[..., str], name: str) -> None:
    rewrite(bad, lambda tensors: tensors.pop(name))
    message = refused()
    assert name in message


def test_wrong_shape(bad: Path, refused: Callable[..., str]) -> None:
    name = "layers.0.attention.out.weight"
    rewrite(bad, lambda tensors: tensors.update({name: torch.ones(480, 479)}))
    message = refused()
    assert f"{name} is [480, 479], not [480, 480]" in message


LAYER = "layers.0.attention.out"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), f"lacks the scales {LAYER}.weight_scale"),
        (lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(480)}), "has the shape [480]"),
        (
            lambda t: t.update({f"{LAYER}.weight": torch.ones(480, 480).char()}),
            "stored: layers.0.attention.out.weight is I8",
        ),
        (lambda t: t.pop(f"{LAYER}.weight"), f"1 missing ({LAYER}.weight)"),
    ],
    ids=["no scale", "scales of rows", "int8", "no weight"],
)
def test_fp8(
    bad: Path,
    refused: Callable[..., str],
    good_fp8: Path,
    change: Callable[[Tensors], object],
    words: str,
) -> None:
    with safe_open(good_fp8, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(good_fp8)
    change(tensors)
    save_file(tensors, bad, metadata=metadata)
    assert words in refused()


def test_truncated_fp8(bad: Path, refused: Callable[..., str], good: Path) -> None:
    write_fp8(good, bad, "scaled")
    bad.write_bytes(bad.read_bytes()[:-1000])
    assert "cut short" in refused()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: b"GGML" + content[4:], "GGUF magic invalid"),
        (lambda content: content[:-1000], "it is cut short"),
        (lambda content: content[:2000], "it is cut short"),
        (lambda content: content[:0], "empty file"),
        (lambda content: content.replace(b"cap_embedder.0", b"cap_embedder.9"), "cap_embedder.0"),
    ],
    ids=["magic", "truncated", "truncated header", "empty", "names"],
)
def test_gguf(
    comfy_server: ComfyServer,
    refused: Callable[..., str],
    good_gguf: Path,
    damage: Callable[[bytes], bytes],
    words: str,
) -> None:
    path = comfy_server.models / "diffusion_models" / "bad.gguf"
    path.write_bytes(damage(good_gguf.read_bytes()))
    assert words in refused(name=path.name)


@pytest.fixture
def bad_folder(comfy_server: ComfyServer, good_folder: Path) -> Iterator[Path]:
    """A diffusers folder in two shards, for a test to damage."""
    folder = comfy_server.models / "diffusion_models" / "bad_folder"
    yield Path(shutil.copytree(good_folder, folder))
    shutil.rmtree(folder)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shard_of(folder).unlink(), "lacks the file diffusion_pytorch_model-00002"),
        (lambda folder: os.truncate(shard_of(folder), 10_000), "it is cut short"),
        (lambda folder: (folder / INDEX).write_text("{"), "is no JSON"),
        (lambda folder: edit_json(folder / INDEX, weight_map={"x": "y"}), "lacks the file y"),
        (
            lambda folder: edit_json(folder / INDEX, weight_map={"x": shard_of(folder).name}),
            "says that x is in diffusion_pytorch_model-00002",
        ),
        (
            lambda folder: edit_json(
                folder / "config.json", _class_name="CogVideoXTransformer3DModel"
            ),
            "'CogVideoXTransformer3DModel', which cannot be split yet",
        ),
        (lambda folder: edit_json(folder / "config.json", n_layers=10**9), "n_layers=1000000000"),
        (lambda folder: edit_json(folder / "config.json", dim="wide"), "that is no size"),
    ],
    ids=[
        "missing shard",
        "truncated shard",
        "broken index",
        "index of another folder",
        "index of missing tensors",
        "unknown class",
        "absurd number of layers",
        "absurd size",
    ],
)
def test_diffusers_folder(
    bad_folder: Path,
    refused: Callable[..., str],
    damage: Callable[[Path], object],
    words: str,
) -> None:
    damage(bad_folder)
    assert words in refused(name=bad_folder.name)


def test_a_good_file_in_the_place_of_a_bad_one(
    comfy_server: ComfyServer, bad: Path, refused: Callable[..., str], good: Path
) -> None:
    bad.write_bytes(b"nothing")
    refused()
    bad.write_bytes(good.read_bytes())
    latent = comfy_server.latent(comfy_server.run(tp_text_to_latent(NAME)))
    assert latent.isfinite().all()


def test_removed_after_it_was_loaded(
    comfy_server: ComfyServer, bad: Path, refused: Callable[..., str]
) -> None:
    comfy_server.run(tp_text_to_latent(NAME))
    bad.unlink()
    refused("")


def test_damaged_after_the_loader_ran(comfy_server: ComfyServer, bad: Path, works: Works) -> None:
    """The loader has read the header of a good file; the ranks find another one."""
    pids = works()
    loader = {"model": tp_loader(NAME, 2)}
    comfy_server.run(with_report(loader, after="model"))
    stat = bad.stat()
    bad.write_bytes(bytes(stat.st_size))
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # ComfyUI does not notice
    with pytest.raises(PromptError) as error:
        comfy_server.run(tp_text_to_latent(NAME))
    print(f"{error.value.type}: {error.value.message}")
    assert error.value.node_id == "sampler"
    assert error.value.type.endswith("CheckpointError")
    assert NAME in error.value.message
    assert works() == pids
