"""Headers of model files made of anything: one error of ours, and no memory beyond the cap.

Damaged real files and known lies are in `tests/unit/test_checkpoint.py` and `test_gguf_file.py`;
frames in `tests/unit/test_protocol.py`.
"""

import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tp_runtime import CheckpointError, inspect_checkpoint
from tp_runtime.safetensors_file import DTYPES, MAX_HEADER_BYTES

MAX_GROWTH_KIB = 64 * 1024

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

fuzzed = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextmanager
def little_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH_KIB


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with little_memory(), pytest.raises(CheckpointError):
        inspect_checkpoint(str(path))


@fuzzed
@given(headers, st.binary(max_size=64))
@example({"x": {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}}, b"\0")
def test_any_safetensors_header(tmp_path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    refused(tmp_path / "any.safetensors", struct.pack("<Q", len(text)) + text + data)


def test_a_header_beyond_the_cap_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    os.truncate(path, 2 * MAX_HEADER_BYTES)
    with little_memory(), pytest.raises(CheckpointError, match="its header would have 100000001"):
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
