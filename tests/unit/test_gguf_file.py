"""GGUF files: the same tensors as the ComfyUI file that they were made from, slice by slice."""

import math
import struct
import sys
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from support.diffusers_folders import FAMILIES
from support.gguf_files import ARCHITECTURES, K_TYPES, WRITTEN, dequantised, quantise, write_gguf
from support.sparse_files import one_block
from support.tiny_models import write_tiny
from tp_runtime.client import CheckpointError, inspect_checkpoint
from tp_runtime.recognise import open_checkpoint
from tp_runtime.sharding.parts import Sharding

KINDS = (*WRITTEN, *K_TYPES)
# One block of each kind, and no width that is a multiple of a block's 256 elements.
SIZES = {
    "z_image": one_block("z_image") | {"num_heads": 18, "ffn_dim": 768, "time_dim": 288},
    "flux": one_block("flux") | {"num_heads": 12},
    "flux2": one_block("flux2") | {"num_heads": 12},
    "qwen_image": one_block("qwen_image") | {"num_heads": 12},
    "qwen_image_21": one_block("qwen_image_21") | {"num_heads": 12},
    "wan": one_block("wan") | {"num_heads": 12},
    "krea2": one_block("krea2") | {"num_heads": 12},
}


@pytest.fixture(scope="module")
def tiny_z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny_z_image.safetensors"
    return write_tiny("z_image", path, **SIZES["z_image"])


def message_for(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(str(path))
    assert path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", SIZES)
def test_it_is_the_model_that_it_was_made_from(tmp_path: Path, family: str, prefix: str) -> None:
    source = FAMILIES[family].write(tmp_path / "whole.safetensors", **SIZES[family])
    path = write_gguf(
        source,
        tmp_path / "model.gguf",
        "Q4_K",
        architecture=ARCHITECTURES[family],
        prefix=prefix,
        flat=True,
    )
    values = load_file(dequantised(path, source, tmp_path / "values.safetensors", prefix))
    info, info_of_source = inspect_checkpoint(str(path)), inspect_checkpoint(str(source))
    assert (info.family, info.sizes) == (info_of_source.family, info_of_source.sizes)
    assert info.num_parameters == info_of_source.num_parameters
    with open_checkpoint(str(path)) as file:
        assert file.tensors() == info.tensors
        for name, expected in values.items():
            found = file.read(name, None, None)
            assert torch.equal(found.float(), expected), name
            assert found.shape == info.tensors[name].shape
            assert file.tensors()[name].dtype == {torch.float16: "F16"}.get(found.dtype, "F32")


def write_one(path: Path, kind: str, shape: tuple[int, ...], **extra: list[int]) -> torch.Tensor:
    """A file with one tensor, "x"; its values."""
    qtype = GGMLQuantizationType[kind]
    blocks = quantise(np.random.default_rng(0).normal(size=shape).astype(np.float32), qtype)
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("x", blocks, raw_dtype=qtype)
    for name, value in extra.items():
        writer.add_array(f"comfy.gguf.{name}.x", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(gguf.dequantize(blocks, qtype).copy()).reshape(shape)


@pytest.mark.parametrize("kind", ["F32", *KINDS])
def test_only_the_blocks_that_are_needed_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "one.gguf"
    values = write_one(path, kind, (6, 1024))
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    with open_checkpoint(str(path)) as file:
        assert file.bytes_read == 0
        for rows, columns in (((2, 5), None), ((1, 3), (512, 768)), ((0, 6), (300, 301))):
            before = file.bytes_read
            found = file.read("x", rows, columns)
            assert torch.equal(found.float(), values[slice(*rows), slice(*(columns or (0, 1024)))])
            start, stop = columns or (0, 1024)
            blocks = math.ceil(stop / block_size) - start // block_size
            assert file.bytes_read - before == (rows[1] - rows[0]) * blocks * block_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_reach_over_rows(tmp_path: Path, kind: str) -> None:
    """The shape that the file notes is not the one in which it was quantised."""
    path = tmp_path / "one.gguf"
    values = write_one(path, kind, (9, 256), orig_shape=[6, 384]).reshape(6, 384)
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    with open_checkpoint(str(path)) as file:
        assert torch.equal(file.read("x", None, None).float(), values)
        assert torch.equal(file.read("x", (1, 3), None).float(), values[1:3])
        assert torch.equal(file.read("x", (2, 6), (100, 200)).float(), values[2:6, 100:200])
        before = file.bytes_read
        file.read("x", (1, 2), None)  # elements 384 to 768
        blocks = math.ceil(768 / block_size) - 384 // block_size
        assert file.bytes_read - before == blocks * block_bytes


def test_two_ranks_read_the_file_once(tiny_gguf: Path) -> None:
    """But for the blocks that both need, and what is not split."""
    info = inspect_checkpoint(str(tiny_gguf))
    with torch.device("meta"):
        model = info.family.forward().build(info.sizes)
    table = info.sizes.table
    sharding = Sharding.of(model, table.plan)
    shares = []
    for rank in range(2):
        parts = sharding.parts(rank, 2, table.sources)
        with open_checkpoint(str(tiny_gguf)) as file:
            for part in parts:
                file.read(part.source, part.rows, part.columns)
            shares.append(file.bytes_read / tiny_gguf.stat().st_size)
    print(shares)
    assert all(0.45 < share < 0.55 for share in shares)


@given(data=st.data())
@settings(max_examples=60)
def test_any_range(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "one.gguf"
    kind = data.draw(st.sampled_from(["Q4_0", "Q6_K"]))
    shape = data.draw(st.sampled_from([(12, 512), (16, 384), (96, 64)]))
    values = write_one(path, kind, (24, 256), orig_shape=list(shape)).reshape(shape)
    rows, columns = (
        sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True)))
        for n in shape
    )
    with open_checkpoint(str(path)) as file:
        found = file.read("x", tuple(rows), tuple(columns))
    assert torch.equal(found, values[slice(*rows), slice(*columns)])


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_z_image: Path) -> Path:
    return write_gguf(tiny_z_image, tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q8_0")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"GGUF", "cut short"),
        (b"<!DOCTYPE html><html>Not found</html>", "magic invalid"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "cut short"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60), "cut short"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "byte order"),
    ],
)
def test_a_file_that_is_no_gguf(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    message = message_for(path)
    assert "is not a whole GGUF file: " in message
    assert words in message
    assert message.endswith("Download it again.")


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 0.001])
def test_a_file_that_was_cut_short(tiny_gguf: Path, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "cut.gguf"
    content = tiny_gguf.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "is not a whole GGUF file: it is cut short: " in message_for(path)


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_header_is_refused_or_harmless(
    tiny_gguf: Path, tmp_path: Path, data: st.DataObject
) -> None:
    with tiny_gguf.open("rb") as file:
        content = bytearray(file.read(20_000))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, 8_000))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    message_for(path)  # cut short in any case


def test_a_type_that_nothing_reads(tmp_path: Path) -> None:
    path = tmp_path / "one.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("x", np.zeros((4, 292), np.uint8), raw_dtype=GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    message = message_for(path)
    assert "x as Q8_K" in message
    assert "Supported: F32, F16, Q4_0, " in message
    assert all(kind in message for kind in KINDS)


@pytest.mark.parametrize("shape", [[5, 5], [-24, -256], [0], [1]])
def test_a_shape_that_cannot_be(tmp_path: Path, shape: list[int]) -> None:
    path = tmp_path / "one.gguf"
    write_one(path, "Q4_0", (24, 256), orig_shape=shape)
    assert "cannot be" in message_for(path)


def test_tensors_that_are_missing(tmp_path: Path, tiny_z_image: Path) -> None:
    tensors = load_file(tiny_z_image)
    del tensors["layers.0.attention.out.weight"]
    save_file(tensors, tmp_path / "less.safetensors")
    path = write_gguf(tmp_path / "less.safetensors", tmp_path / "less.gguf", "Q8_0")
    assert "1 missing (layers.0.attention.out.weight)" in message_for(path)


def test_a_text_encoder(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    write_one(path, "Q4_0", (24, 256))
    assert "an architecture that cannot be split yet" in message_for(path)


def header(fields: int, *entries: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(entries)


def text_of(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def list_of(kind: gguf.GGUFValueType, length: int, items: bytes, name: bytes = b"a") -> bytes:
    """A field that is a list of this kind."""
    return text_of(name) + struct.pack("<IIQ", gguf.GGUFValueType.ARRAY, kind, length) + items


KIND = gguf.GGUFValueType
SHORT_LISTS = [list_of(KIND.UINT8, 16, bytes(16), b"%d" % number) for number in range(5000)]
WORDS = b"".join(text_of(b"word %d" % number) for number in range(200_000))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (header(1, list_of(KIND.UINT8, 10**7, bytes(10**7))), "cannot be split yet"),
        (header(1, list_of(KIND.STRING, 200_000, WORDS)), "cannot be split yet"),
        (header(1, list_of(KIND.STRING, 300_000, WORDS)), "cut short"),
        (header(1, list_of(KIND.UINT64, 2**61, b"")), "cut short"),
        (
            header(1, list_of(KIND.STRING, 2**61, bytes(10**6))),
            "a list of 2305843009213693952 texts",
        ),
        (header(1, list_of(KIND.ARRAY, 1, struct.pack("<IQ", 9, 1) * 5000)), "a list of lists"),
        (header(2**40), "1099511627776 things are listed"),
        (header(0, tensors=2**40), "1099511627776 things are listed"),
        (header(5000, *SHORT_LISTS), "things are listed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_costs_little_time_and_memory(tmp_path: Path, content: bytes, words: str) -> None:
    """Lists of millions, as a text encoder's words, are passed over; nothing is made of them."""
    path = tmp_path / "model.gguf"
    path.write_bytes(content + bytes(64))
    tracemalloc.start()
    assert words in message_for(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 + 1000 * 2**16  # a field or an item of a short list takes a kilobyte


def test_without_the_package(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tp_runtime.files.gguf_file", raising=False)
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = message_for(tiny_gguf)
    assert f"'gguf', which is not installed in {sys.executable}" in message
    assert f"Run: {sys.executable} -m pip install gguf" in message


def test_a_name_in_capitals(tmp_path: Path, tiny_gguf: Path) -> None:
    path = tmp_path / "MODEL.GGUF"
    path.symlink_to(tiny_gguf)
    assert inspect_checkpoint(str(path)).family.name == "z_image"
