"""Tensors in shared memory, and the book of those that the ranks hold."""

import os
from collections.abc import Iterator

import pytest
import torch

from tp_runtime.client import held_tensors
from tp_runtime.client.held_tensors import HeldTensors
from tp_runtime.errors import InputError, ProtocolError, TPRuntimeError
from tp_runtime.wire.exchange import (
    ALIGNMENT,
    HEADER_BYTES,
    Exchange,
    TensorPlaces,
    dtype_name,
    dtype_of,
)
from tp_runtime.wire.protocol import TensorRef

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    exchange = Exchange.create()
    yield exchange
    exchange.close()


@pytest.fixture
def reader(exchange: Exchange) -> Iterator[Exchange]:
    """The memory as a rank maps it."""
    reader = Exchange(os.dup(exchange.fd))
    yield reader
    reader.close()


def sent(exchange: Exchange, reader: Exchange, *tensors: torch.Tensor) -> list[torch.Tensor]:
    places = TensorPlaces()
    refs = [places.place(tensor) for tensor in tensors]
    places.write_to(exchange)
    reader.remap(exchange.size)
    return [reader.view(ref) for ref in refs]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().clone().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_every_dtype_arrives_bit_for_bit(
    exchange: Exchange, reader: Exchange, dtype: torch.dtype
) -> None:
    values = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    (found,) = sent(exchange, reader, values)
    assert (found.dtype, found.shape) == (dtype, values.shape)
    assert as_bytes(found) == as_bytes(values)
    assert dtype_of(dtype_name(dtype)) is dtype


def test_every_layout_arrives(exchange: Exchange, reader: Exchange) -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    tensors = [
        torch.tensor(3.5),
        torch.tensor(1).expand(1),  # one element, stride 0
        torch.tensor([7.0]).expand(4, 1),
        base.permute(2, 0, 1),
        base[:, ::2],
        base[..., -1],
        torch.empty(0, 5),
        torch.empty(2, 0),
        torch.full((2,), float("nan")),
    ]
    found = sent(exchange, reader, *tensors)
    for given, arrived in zip(tensors, found, strict=True):
        assert arrived.shape == given.shape
        assert torch.equal(arrived.nan_to_num(9.0), given.nan_to_num(9.0))


def test_a_view_serves_every_step(exchange: Exchange) -> None:
    """Made once, also for a caller who is in inference mode at times."""
    exchange.reserve(64)
    ref = TensorRef((4,), "float32", 0)
    with torch.inference_mode():
        view = exchange.view(ref)
        exchange.write(ref, torch.arange(8.0)[::2])
    exchange.write(ref, torch.arange(4.0))
    exchange.view(ref).mul_(2)
    assert exchange.view(ref) is view
    assert view.tolist() == [0, 2, 4, 6]
    exchange.reserve(2**20)
    assert exchange.view(ref) is not view
    assert exchange.view(ref).tolist() == [0, 2, 4, 6]


def test_a_tensor_with_a_gradient_leaves_none_behind(exchange: Exchange) -> None:
    exchange.reserve(64)
    ref = TensorRef((4,), "float32", 0)
    exchange.write(ref, torch.arange(8.0).requires_grad_()[::2])
    assert not exchange.view(ref).requires_grad
    assert exchange.view(ref).tolist() == [0, 2, 4, 6]


class UnderWay:
    """A copy from or to a GPU, as an event or a stream says when it has been made."""

    def __init__(self, exchange: Exchange, noted: list[bytes]) -> None:
        self._exchange, self._noted = exchange, noted

    def synchronize(self) -> None:
        ref = TensorRef((4,), "uint8", 0)
        self._noted.append(bytes(self._exchange.view(ref).tolist()))


@pytest.mark.parametrize("copies", ["_reading", "_writing"])
@pytest.mark.parametrize("what", ["wait", "reserve", "close"])
def test_copies_under_way_are_waited_for(exchange: Exchange, what: str, copies: str) -> None:
    """Once, and before the memory goes."""
    exchange.reserve(64)
    exchange.write(TensorRef((4,), "uint8", 0), torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    noted: list[bytes] = []
    under_way = UnderWay(exchange, noted)
    setattr(exchange, copies, {"_reading": {None: under_way}, "_writing": {under_way}}[copies])
    for _ in range(2):
        {
            "wait": exchange.wait,
            "reserve": lambda: exchange.reserve(2**20),
            "close": exchange.close,
        }[what]()
        assert noted == [b"\1\2\3\4"]


def test_places_do_not_overlap() -> None:
    places = TensorPlaces()
    refs = [places.place(torch.zeros(size, dtype=torch.uint8)) for size in (1, 300, 0, 256)]
    assert [ref.offset for ref in refs] == [HEADER_BYTES + start for start in (0, 256, 768, 768)]
    assert places.reserve(10) == HEADER_BYTES + 1024
    assert places.size == HEADER_BYTES + 1024 + ALIGNMENT


def test_a_rank_writes_where_the_engine_reads(exchange: Exchange, reader: Exchange) -> None:
    places = TensorPlaces()
    ref = TensorRef((2, 3), "float32", places.reserve(24))
    places.write_to(exchange)
    reader.remap(exchange.size)
    reader.write(ref, torch.ones(3, 2).T)
    assert torch.equal(exchange.view(ref), torch.ones(2, 3))


def test_growth_keeps_what_was_looked_at(exchange: Exchange, reader: Exchange) -> None:
    (small,) = sent(exchange, reader, torch.ones(10))
    before = exchange.size
    (large,) = sent(exchange, reader, torch.full((1_000_000,), 2.0))
    assert exchange.size >= 4_000_000 > before
    assert large.sum() == 2_000_000
    assert small.shape == (10,)  # still mapped; its content has been written over
    size = exchange.size
    sent(exchange, reader, torch.ones(10))
    assert exchange.size == size, "the memory does not shrink, nor grow without need"


@pytest.mark.parametrize(
    "ref",
    [
        TensorRef((1,), "float32", 4096),
        TensorRef((1024,), "float32", 4),
        TensorRef((1,), "float32", -1),
        TensorRef((2**62,), "float64", 0),
    ],
)
def test_a_place_outside_is_refused(exchange: Exchange, ref: TensorRef) -> None:
    exchange.reserve(4096)
    with pytest.raises(ProtocolError, match="outside the 4096 bytes"):
        exchange.view(ref)


def test_nothing_is_mapped_at_first(exchange: Exchange) -> None:
    with pytest.raises(ProtocolError, match="outside the 0 bytes"):
        exchange.view(TensorRef((1,), "float32", 0))


def test_a_rank_does_not_map_more_than_there_is(exchange: Exchange, reader: Exchange) -> None:
    exchange.reserve(4096)
    with pytest.raises(ProtocolError, match="fewer exist"):
        reader.remap(2 * 4096)


def test_a_lack_of_memory_is_an_error_and_no_signal(exchange: Exchange) -> None:
    with pytest.raises(TPRuntimeError, match="are not to be had"):
        exchange.reserve(2**62)
    assert exchange.size == 0


def test_closing_gives_the_memory_back() -> None:
    exchange = Exchange.create()
    exchange.reserve(4096)
    exchange.close()
    exchange.close()
    assert exchange.size == 0


def test_unknown_dtypes() -> None:
    with pytest.raises(InputError, match="complex64 cannot be sent"):
        TensorPlaces().place(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ProtocolError, match="'float3'"):
        dtype_of("float3")


class TestHeldTensors:
    """The engine's book of what the ranks hold."""

    def test_content_is_what_counts(self) -> None:
        held = HeldTensors()
        tensor = torch.arange(6.0).view(2, 3)
        key = held.add(tensor)
        assert key > 0
        assert held.find([tensor.clone()]) == [key]
        assert held.find([tensor.T.contiguous().T]) == [key]
        for other in (tensor + 1, tensor.view(3, 2), tensor.double(), tensor[:1]):
            assert held.find([other]) == [0]

    def test_several_at_once(self) -> None:
        """Each is found, stays in use, and is compared with few where requests are alike."""
        held = HeldTensors(limit_bytes=5 * 12)
        tensors = [torch.full((3,), float(i)) for i in range(5)]
        keys = [held.add(tensor) for tensor in tensors]
        held.commit()
        wanted = [tensors[0], torch.full((3,), 9.0), tensors[4], tensors[0].clone()]
        assert held.find(wanted) == [keys[0], 0, keys[4], keys[0]]
        with pytest.MonkeyPatch.context() as patch:
            pairs: list[object] = []
            equal = held_tensors._equal
            patch.setattr(held_tensors, "_equal", lambda *pair: pairs.append(pair) or equal(*pair))
            assert held.find([tensors[0], tensors[4]]) == [keys[0], keys[4]]
        assert len(pairs) == 2
        held.add(torch.ones(6))
        assert held.evict(set()) == keys[1:3]

    def test_it_is_a_copy(self) -> None:
        held = HeldTensors()
        tensor = torch.zeros(3)
        held.add(tensor)
        tensor += 1
        assert held.find([tensor]) == [0]
        assert held.find([torch.zeros(3)]) != [0]

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
    def test_every_dtype_can_be_compared(self, dtype: torch.dtype) -> None:
        held = HeldTensors()
        key = held.add(torch.ones(3).to(dtype))
        assert held.find([torch.ones(3).to(dtype)]) == [key]
        assert held.find([torch.zeros(3).to(dtype)]) == [0]

    def test_an_expanded_tensor_counts_in_full(self) -> None:
        held = HeldTensors(limit_bytes=100)
        key = held.add(torch.zeros(1).expand(50))
        assert held.evict(set()) == [key]

    def test_the_least_recently_used_go_first(self) -> None:
        held = HeldTensors(limit_bytes=24)
        first, second, third = (held.add(torch.full((3,), float(i))) for i in range(3))
        held.commit()
        assert held.find([torch.full((3,), 0.0)]) == [first]
        assert held.evict({third}) == [second]
        assert held.find([torch.full((3,), 1.0)]) == [0]

    def test_what_is_in_use_stays(self) -> None:
        held = HeldTensors(limit_bytes=0)
        keys = {held.add(torch.full((3,), float(i))) for i in range(3)}
        assert held.evict(keys) == []
        assert held.evict(set()) == sorted(keys)

    def test_keys_are_never_used_again(self) -> None:
        held = HeldTensors(limit_bytes=0)
        first = held.add(torch.zeros(1))
        held.evict(set())
        held.commit()
        assert held.add(torch.zeros(1)) > first

    def test_a_request_that_was_not_sent_is_undone(self) -> None:
        held = HeldTensors(limit_bytes=12)
        old = held.add(torch.zeros(3))
        assert held.evict({old}) == []
        held.commit()

        new = held.add(torch.ones(3))
        assert held.evict({new}) == [old]
        held.roll_back()
        assert held.find([torch.ones(3)]) == [0], "the ranks never got it"

        newer = held.add(torch.ones(3))
        assert held.evict({newer}) == [old], "the ranks still hold it"
        held.commit()
        assert held.evict({newer}) == []
        held.roll_back()
        assert held.find([torch.ones(3)]) == [newer]


def test_streams_are_let_go_again_where_a_rank_took_the_number_back(exchange: Exchange) -> None:
    """A cancel lets both of two requests go; then the first one's answer comes."""
    exchange.reserve(1)
    numbers = torch.frombuffer(exchange._map, dtype=torch.int32, count=1)
    exchange._awaited[0] = 5
    exchange.release()
    assert numbers[0] == 5
    exchange.say_given(0, 4)
    exchange.close()  # the group's end
    assert numbers[0] == 5
