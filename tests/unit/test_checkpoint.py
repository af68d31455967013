"""Model files that cannot be used: each is refused from its header, with a message that helps."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.sparse_files import holes, one_block, write_sparse
from support.tiny_models import tiny, tiny_shapes, write, write_tiny
from tp_runtime.client import CheckpointError, SizeError, inspect_checkpoint
from tp_runtime.recognise import open_checkpoint

Tensors = dict[str, torch.Tensor]

ONE_BLOCK = one_block("z_image")


@pytest.fixture(scope="module")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one block of each kind."""
    path = tmp_path_factory.mktemp("models") / "tiny_z_image.safetensors"
    return write_tiny("z_image", path, **ONE_BLOCK)


def message_for(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(str(path))
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


def test_the_sizes_are_read_from_the_header(tiny_z_image: Path) -> None:
    info = inspect_checkpoint(str(tiny_z_image))
    assert (info.family.name, info.label) == ("z_image", "Z-Image")
    assert (info.sizes.num_heads, info.sizes.head_dim, info.sizes.num_layers) == (30, 16, 1)
    tensors = load_file(tiny_z_image)
    assert info.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert info.valid_tp_sizes() == (1, 2, 3, 4, 5, 6, 8)
    with pytest.raises(SizeError, match=r"Z-Image cannot be split over 7 .* num_heads=30"):
        info.check_tp_size(7)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_a_prefix_is_taken_off(tiny_z_image: Path, tmp_path: Path, prefix: str) -> None:
    path = write_tiny("z_image", tmp_path / "prefixed.safetensors", prefix=prefix, **ONE_BLOCK)
    found, plain = inspect_checkpoint(str(path)), inspect_checkpoint(str(tiny_z_image))
    assert (found.sizes, found.tensors) == (plain.sizes, plain.tensors)
    with open_checkpoint(str(path)) as file:
        assert file.read("x_pad_token", None, None).shape == (1, 480)


def test_what_else_a_full_checkpoint_holds_is_left_aside(
    tiny_z_image: Path, tmp_path: Path
) -> None:
    tensors = {f"model.diffusion_model.{k}": v for k, v in load_file(tiny_z_image).items()}
    path = tmp_path / "full.safetensors"
    save_file(tensors | {"vae.decoder.weight": torch.zeros(3)}, path)
    assert inspect_checkpoint(str(path)).sizes.num_heads == 30


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    assert message_for(path) == f"The model file {path} does not exist. Choose another file."
    assert "does not exist" in message_for(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
    ],
    ids=["empty", "short", "absurd header", "long header", "cut header", "list", "not text"],
)
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert "is not a whole safetensors file: " in message_for(path)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01])
def test_a_file_that_was_cut_short(tiny_z_image: Path, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.safetensors"
    content = tiny_z_image.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    message = message_for(path)
    assert "is not a whole safetensors file: " in message
    assert "Download it again" in message


def header_of(entry: object) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**60]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [True, 4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F33", "shape": [4], "data_offsets": [0, 2**60]},
        {"shape": [4]},
        7,
    ],
    ids=str,
)
def test_a_header_that_lies(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(header_of(entry))
    assert "is not a whole safetensors file: " in message_for(path)


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_header_is_refused_or_harmless(
    tiny_z_image: Path, tmp_path: Path, data: st.DataObject
) -> None:
    with tiny_z_image.open("rb") as file:
        content = bytearray(file.read(200_000))
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    message_for(path)  # cut short in any case


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[Callable[[Tensors], object]], str]:
    """`changed(edit)`: the message for the tiny model after `edit` of its tensors."""

    def make(edit: Callable[[Tensors], object]) -> str:
        tensors = holes(tiny_shapes("z_image", **ONE_BLOCK))
        edit(tensors)
        return message_for(write_sparse(tmp_path / "changed.safetensors", tensors))

    return make


Changed = Callable[[Callable[[Tensors], object]], str]


def test_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"conv_in.weight": torch.zeros(2), "a.bias": torch.zeros(2)}, path)
    message = message_for(path)
    assert "an architecture that cannot be split yet" in message
    assert "first tensors: a.bias, conv_in.weight" in message
    assert "Z-Image" in message
    assert "'Load Diffusion Model'" in message


@pytest.mark.parametrize(
    ("told", "variant"),
    [
        (
            {"model_type": "flow_rvs"},
            "FlowRVS file (its metadata set model_type to flow_rvs)",
        ),
        ({"causal_ar": True}, "causal Wan"),
    ],
    ids=["FlowRVS", "causal"],
)
def test_a_variant_that_only_the_metadata_tell(
    tmp_path: Path, told: dict[str, Any], variant: str
) -> None:
    changes = {"in_channels": 36, "image_dim": 1280}
    shapes = tiny_shapes("wan", **changes)
    path = write(tmp_path / "variant.safetensors", shapes, told=told)
    assert variant in message_for(path)
    path = write(tmp_path / "usual.safetensors", shapes, told={"model_type": "i2v"})
    assert inspect_checkpoint(str(path)).sizes == tiny("wan", **changes)
    path = write(tmp_path / "animate.safetensors", shapes, told={"model_type": "animate2"})
    assert inspect_checkpoint(str(path)).sizes == tiny("wan", **changes, poses_pass=True)


def test_no_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / "nothing.safetensors")
    assert "cannot be split yet" in message_for(tmp_path / "nothing.safetensors")


def test_missing_tensors(changed: Changed) -> None:
    message = changed(
        lambda t: [t.pop(f"noise_refiner.0.feed_forward.{name}.weight") for name in ("w1", "w2")]
    )
    names = "noise_refiner.0.feed_forward.w1.weight, noise_refiner.0.feed_forward.w2.weight"
    assert f"2 missing ({names})" in message
    assert "Download it again" in message


def test_a_missing_tensor_that_gives_a_size(changed: Changed) -> None:
    message = changed(lambda t: t.pop("layers.0.attention.q_norm.weight"))
    assert "lacks the tensor 'layers.0.attention.q_norm.weight'" in message


def test_a_tensor_that_nothing_uses(tiny_z_image: Path, tmp_path: Path) -> None:
    """ComfyUI says so in its log and goes on; a VAE beside the model, a marker without size."""
    more = {"control.weight": torch.zeros(2), "marker": torch.zeros(0)}
    path = tmp_path / "more.safetensors"
    save_file(load_file(tiny_z_image) | more, path)
    info, plain = inspect_checkpoint(str(path)), inspect_checkpoint(str(tiny_z_image))
    assert info.extra.keys() == more.keys()
    assert (info.tensors, info.sizes, plain.extra) == (plain.tensors, plain.sizes, {})


@pytest.mark.parametrize("prefix", ["model.", "model.model.", "net.", "diffusion_model."])
def test_prefixes(tiny_z_image: Path, tmp_path: Path, prefix: str) -> None:
    """Those that ComfyUI takes off; what other parts of a file have is no part of the model."""
    path = tmp_path / "prefixed.safetensors"
    named = {prefix + name: tensor for name, tensor in load_file(tiny_z_image).items()}
    save_file(named | {"vae.conv_in.weight": torch.zeros(1)}, path)
    info = inspect_checkpoint(str(path))
    assert (info.tensors, info.extra) == (inspect_checkpoint(str(tiny_z_image)).tensors, {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04 what torch.save writes", "is a pickle"),
        (b"\x80\x02}q\x00X\x05\x00 what it wrote before", "is a pickle"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00", "a name that ends in .gguf"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
    ],
)
def test_a_file_of_another_kind_is_refused_as_what_it_is(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    message = message_for(path)
    assert words in message
    assert "is not a whole safetensors file" not in message


def test_a_large_header(tiny_z_image: Path, tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file(load_file(tiny_z_image), path, metadata={"workflow": "x" * (17 << 20)})
    assert len(inspect_checkpoint(str(path)).metadata["workflow"]) == 17 << 20


def test_a_tensor_of_another_shape(changed: Changed) -> None:
    message = changed(lambda t: t.update({"x_pad_token": torch.zeros(2, 480)}))
    assert "1 of another shape (x_pad_token is [2, 480], not [1, 480])" in message


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    family: tiny_shapes(family, **one_block(family))
    for family in (
        "z_image",
        "flux",
        "flux2",
        "qwen_image",
        "wan",
        "krea2",
    )
}


@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 0), (1, 2, 3), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("family", SHAPES)
def test_shapes_that_no_model_has(tmp_path: Path, family: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / "model.safetensors"
    for name in tiny(family, **one_block(family)).table.file_tensors:
        shapes = SHAPES[family] | {name: shape}
        assert message_for(write_sparse(path, holes(shapes, torch.float8_e4m3fn))), name


@pytest.mark.parametrize(
    "description",
    [torch.tensor(2**40), torch.zeros(2**17, dtype=torch.uint8), torch.zeros(3), b"[" * 60_000],
    ids=["a number", "long", "floats", "deep"],
)
def test_a_description_of_fp8_that_is_none(
    changed: Changed, description: torch.Tensor | bytes
) -> None:
    if isinstance(description, bytes):
        description = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    message = changed(lambda tensors: tensors.update({"layers.0.x.comfy_quant": description}))
    assert "does not say in a readable way how it is quantised" in message


def test_the_size_of_fp8_follows_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    """Without a scale it is held in that; what is quantised stays as it is."""
    tensors = holes(tiny_shapes("z_image", **ONE_BLOCK), torch.float8_e4m3fn)
    path = write_sparse(tmp_path / "plain.safetensors", tensors)
    info = inspect_checkpoint(str(path))
    assert [info.weight_bytes(n) for n in (1, 2, 4)] == [n * info.num_parameters for n in (1, 2, 4)]
    name, weight = next(iter(info.tensors.items()))
    mixed = dataclasses.replace(info, quantised=dict.fromkeys([name]), quantised_bytes=7)
    assert mixed.weight_bytes(2) == 7 + 2 * (info.num_parameters - weight.num_elements)


def test_a_width_that_heads_do_not_divide(changed: Changed) -> None:
    message = changed(lambda t: t.update({"layers.0.attention.q_norm.weight": torch.zeros(64)}))
    assert "width 480 with heads of 64" in message


def test_only_what_is_asked_for_is_read(tiny_z_image: Path) -> None:
    name, size = "layers.0.attention.qkv.weight", tiny("z_image")
    whole = load_file(tiny_z_image)[name]
    with open_checkpoint(str(tiny_z_image)) as file:
        assert file.bytes_read == 0
        assert torch.equal(file.read(name, (16, 48), None), whole[16:48])
        assert file.bytes_read == 32 * size.dim * 4
        assert torch.equal(file.read(name, (0, 8), (4, 12)), whole[:8, 4:12])
        assert file.bytes_read == 32 * size.dim * 4 + 8 * 8 * 4
