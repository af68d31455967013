"""Messages survive the wire; whatever else arrives is a ProtocolError and costs no memory."""

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.memory import at_most
from tp_runtime.config import ModelSpec
from tp_runtime.errors import ProtocolError
from tp_runtime.wire.protocol import (
    MAX_FRAME_BYTES,
    VERSION,
    Close,
    Done,
    Evaluate,
    Evaluation,
    Failed,
    Load,
    MeasureLink,
    Progress,
    Ready,
    Report,
    TensorRef,
    Unload,
    decode_reply,
    decode_request,
    encode,
    pack_inputs,
)

REF = TensorRef((1, 16, 128, 128), "bfloat16", 256, 3)

REQUESTS = [
    Load(1, "model@1", ModelSpec("/models/å.safetensors", "bfloat16", "float32", (7, 2**62))),
    Unload(2, "model@1"),
    Report(3),
    MeasureLink(4),
    Close(),
]
REPLIES = [
    Ready(3, 4, "cuda:3 NVIDIA H200", {"torch": "2.13.0"}),
    Progress(1, 2**40, 2**41),
    Done(1),
    Done(2, {"resident_bytes": 2**40, "models": {}}),
    Failed(5, True, "InputError", "message", "Traceback", 12.5),
]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=64)
    | st.builds(
        TensorRef,
        st.lists(st.integers(0, 2**40), max_size=6).map(tuple),
        st.text(max_size=12),
        st.integers(-1, 2**60),
        st.integers(0, 2**60),
    )
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner)
)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda r: type(r).__name__)
def test_requests_survive_the_wire(request_: Any) -> None:
    assert decode_request(encode(request_)) == request_


@pytest.mark.parametrize("reply", REPLIES, ids=lambda r: type(r).__name__)
def test_replies_survive_the_wire(reply: Any) -> None:
    assert decode_reply(encode(reply)) == reply


@given(st.dictionaries(st.text(), trees))
def test_inputs_survive_the_wire(inputs: dict[str, Any]) -> None:
    message = Evaluate(7, "m", [Evaluation(pack_inputs(inputs), (REF, REF))], [1, 2], 4096)
    arrived = decode_request(encode(message))
    assert isinstance(arrived, Evaluate)
    assert arrived.evaluations == [Evaluation(inputs, (REF, REF))]
    assert (arrived.drop, arrived.exchange_bytes) == ([1, 2], 4096)


def test_tuples_arrive_as_lists() -> None:
    message = Evaluate(7, "m", [Evaluation(pack_inputs({"sizes": (1, (REF,))}), (REF,))], [], 0)
    arrived = decode_request(encode(message))
    assert isinstance(arrived, Evaluate)
    assert arrived.evaluations[0].inputs == {"sizes": [1, [REF]]}


def endless() -> list[Any]:
    items: list[Any] = []
    items.append(items)
    return items


@pytest.mark.parametrize(
    "value", [object(), print, 2**70, "\ud800", endless(), 1j], ids=lambda v: type(v).__name__
)
def test_what_is_not_plain_data_cannot_be_sent(value: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be encoded"):
        encode(Done(1, value))


def test_a_frame_is_capped() -> None:
    encode(Done(1, b"x" * (MAX_FRAME_BYTES - 100)))
    with pytest.raises(ProtocolError, match=f"at most {MAX_FRAME_BYTES} fit"):
        encode(Done(1, b"x" * MAX_FRAME_BYTES))


def test_another_version_is_refused() -> None:
    body = msgspec.Raw(msgspec.msgpack.encode(Report(1)))
    frame = msgspec.msgpack.encode({"version": VERSION + 1, "body": body})
    for decode in (decode_request, decode_reply):
        with pytest.raises(ProtocolError, match=f"version {VERSION + 1}; this side speaks"):
            decode(frame)


def test_the_two_directions_are_not_mixed_up() -> None:
    with pytest.raises(ProtocolError, match="malformed frame"):
        decode_reply(encode(Report(1)))
    with pytest.raises(ProtocolError, match="malformed frame"):
        decode_request(encode(Done(1)))


def test_an_unknown_extension_is_refused() -> None:
    with pytest.raises(ProtocolError, match="extension 9"):
        decode_reply(encode(Done(1, msgspec.msgpack.Ext(9, b""))))


def assert_only_protocol_errors(frame: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with contextlib.suppress(ProtocolError):
            decode(frame)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_raise_a_protocol_error(data: bytes) -> None:
    assert_only_protocol_errors(data)
    body = msgspec.Raw(data)
    assert_only_protocol_errors(msgspec.msgpack.encode({"version": VERSION, "body": body}))


def test_text_that_is_no_utf8_is_a_protocol_error() -> None:
    frame = encode(Progress(1, 2, 3)).replace(b"Progress", b"\x80rogress")
    with pytest.raises(ProtocolError):
        decode_reply(frame)


@given(st.sampled_from([*REQUESTS, *REPLIES]), st.data())
def test_damaged_frames_decode_or_raise_a_protocol_error(message: Any, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert_only_protocol_errors(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


@pytest.mark.parametrize(
    "claim",
    [
        b"\xdd\xff\xff\xff\xff",  # a list of 2**32 - 1 elements
        b"\xdf\xff\xff\xff\xff",  # a map
        b"\xdb\xff\xff\xff\xff",  # a text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension
        b"\xdd\xff\xff\xff\xff" * 900,
        b"\x91" * 100_000,
    ],
    ids=["list", "map", "text", "extension", "nested lists", "deep"],
)
def test_what_a_frame_claims_to_hold_takes_no_memory(claim: bytes) -> None:
    body = msgspec.msgpack.encode(Done(1, 0))[:-1] + claim
    frame = msgspec.msgpack.encode({"version": VERSION, "body": msgspec.Raw(body)})
    with at_most(2**20), pytest.raises(ProtocolError):
        decode_reply(frame)


@pytest.mark.parametrize("value", [[], {}, [[]], 0.0, ""], ids=repr)
def test_a_frame_takes_memory_in_proportion_to_its_length(value: Any) -> None:
    """At most so much a byte, whatever it holds; and a frame is capped."""
    frame = encode(Done(1, [value] * 2**18))
    with at_most(100 * len(frame)):
        decode_reply(frame)
