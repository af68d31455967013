"""Headers of model files made of anything: one error of ours, and no memory beyond the cap.

Damaged real files and known lies are in `tests/unit/test_checkpoint.py` and `test_gguf_file.py`;
frames in `tests/unit/test_protocol.py`.
"""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tp_runtime.files.gguf_file  # noqa: F401  what its import takes does not count
from support.fuzz import examples
from support.memory import at_most
from tp_runtime.client import CheckpointError, inspect_checkpoint
from tp_runtime.files.safetensors_file import DTYPES, MAX_HEADER_BYTES

MAX_BYTES = 32 * 2**20  # whatever a small file claims

numbers = st.integers(-(2**64), 2**64) | st.sampled_from([0, 1, 4, 16, 2**31, 2**62, 2**63])
anything = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", ""]) | anything,
        "shape": st.lists(numbers, max_size=5) | anything,
        "data_offsets": st.lists(numbers, max_size=3) | anything,
    },
)
names = st.sampled_from(["x_pad_token", "img_in.weight", "__metadata__"]) | st.text(max_size=8)
headers = st.dictionaries(names, entries | anything, max_size=6) | anything

fuzzed = examples(200)


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with at_most(MAX_BYTES), pytest.raises(CheckpointError):
        inspect_checkpoint(str(path))


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@fuzzed
@given(headers, st.binary(max_size=64))
@example({"x": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, b"\0")
def test_any_safetensors_header(tmp_path: Path, header: object, data: bytes) -> None:
    refused(tmp_path / "any.safetensors", safetensors(json.dumps(header).encode(), data))


def entry_of(shape: str, offsets: str = "[0,4]", dtype: str = '"F32"') -> bytes:
    text = f'{{"x":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'
    return safetensors(text.encode(), b"\0" * 16)


# What such readers have stumbled over.
CORPUS = {
    "no header": b"",
    "a length of zero": struct.pack("<Q", 0),
    "a negative length": struct.pack("<q", -1) + b"{}",
    "no JSON": safetensors(b"\x80\x04\x95pickle"),
    "JSON that goes on": safetensors(b"{}{}"),
    "half a JSON": safetensors(b'{"x":'),
    "a byte order mark": safetensors("\ufeff{}".encode()),
    "UTF-16": safetensors("{}".encode("utf-16")),
    "a lone surrogate": safetensors(b'{"\\ud800":{}}'),
    "deep lists": safetensors(b"[" * 2**20),
    "deep maps": safetensors(b'{"x":' * 2**18),
    "an endless number": entry_of("[" + "9" * 2**20 + "]"),
    "many axes": entry_of("[" + ",".join(["9223372036854775807"] * 2**16) + "]"),
    "no axis, no bytes": entry_of("[]", "[0,0]"),
    "a product that overflows": entry_of("[4294967296,4294967296]", "[0,0]"),
    "infinity": entry_of("[1e999]"),
    "not a number": entry_of("[NaN]"),
    "a size that is true": entry_of("[true]"),
    "a size that is a text": entry_of('["1"]'),
    "a size below zero": entry_of("[-1]", "[4,0]"),
    "offsets that go back": entry_of("[1]", "[8,4]"),
    "offsets beyond the end": entry_of("[4611686018427387904]", "[0,18446744073709551616]"),
    "three offsets": entry_of("[1]", "[0,4,8]"),
    "a dtype of another release": entry_of("[1]", dtype='"F4"'),
    "a dtype that is a list": entry_of("[1]", dtype="[]"),
    "metadata that is a list": safetensors(b'{"__metadata__":[1,2]}'),
    "metadata that is a number": safetensors(b'{"__metadata__":1}'),
    "nothing but metadata": safetensors(b'{"__metadata__":{"format":"pt"}}'),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", CORPUS)
def test_the_corpus(tmp_path: Path, name: str) -> None:
    refused(tmp_path / "known.safetensors", CORPUS[name])


@pytest.mark.parametrize("filling", [b"[]", b"{}", b"1e1", b'"x"'])
def test_a_header_takes_memory_in_proportion_to_its_length(tmp_path: Path, filling: bytes) -> None:
    header = b"[" + b",".join([filling] * 2**18) + b"]"
    path = tmp_path / "full.safetensors"
    path.write_bytes(safetensors(header))
    with at_most(32 * len(header)), pytest.raises(CheckpointError):
        inspect_checkpoint(str(path))


def test_a_header_beyond_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    message = f"would have {MAX_HEADER_BYTES + 1} bytes; .* at most {MAX_HEADER_BYTES}"
    with at_most(MAX_BYTES), pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(str(path))


@fuzzed
@given(
    st.sampled_from([0, 1, 2, 3, 2**31]),
    st.integers(0, 2**64 - 1) | st.integers(0, 3),
    st.integers(0, 2**64 - 1) | st.integers(0, 3),
    st.binary(max_size=200),
)
@example(3, 0, 1, struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62))  # an array
@example(3, 0, 1, struct.pack("<Q", 2**62))  # the length of a key
@example(3, 1, 0, struct.pack("<Q", 1) + b"x" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0))
def test_any_gguf_header(
    tmp_path: Path, version: int, tensors: int, fields: int, rest: bytes
) -> None:
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, fields)
    refused(tmp_path / "any.gguf", head + rest)
