"""Layers whose weights lie in the host's memory, and come to the device when they are used.

The device has a *ring* for them: memory that their weights pass through in the order of their use.
While a layer is multiplied, those after it are copied, on a stream of their own, as far as the ring
has room. The order is the one of the last evaluation of the same kind; a layer out of its turn is
copied when it is asked for, which is slower and as right. All of it can be recorded in a CUDA
graph: the addresses, the copies and what waits for what stay the same.

On the CPU the copies are made at once, and nothing else differs.
"""

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

MAX_ORDERS = 32  # kinds of evaluations whose order is known: with other options, other blocks


@dataclass(frozen=True, eq=False)
class StreamedLayer:
    """A layer, and its parameters in the host's memory; on a GPU page-locked.

    ``host`` (bytes,): all of them. ``tensors``: each by its name in the layer, a view of that, and
    what the parameter is while the layer is not used.
    """

    layer: nn.Module
    host: torch.Tensor
    tensors: Mapping[str, torch.Tensor]

    @contextlib.contextmanager
    def lying_in(self, place: torch.Tensor) -> Iterator[None]:
        """Have the parameters be those in ``place``, which is as long as ``host``."""
        parameters = {name: self.layer.get_parameter(name) for name in self.tensors}
        for name, tensor in self.tensors.items():
            start = tensor.data_ptr() - self.host.data_ptr()
            copy = place[start : start + tensor.nbytes]
            parameters[name].data = copy.view(tensor.dtype).view(tensor.shape)
        try:
            yield
        finally:
            for name, tensor in self.tensors.items():
                parameters[name].data = tensor


class LayerStream:
    """The streamed layers of a model, and the ring that they pass through."""

    def __init__(
        self, layers: Sequence[StreamedLayer], device: torch.device, ring_bytes: int
    ) -> None:
        """From now on, the layers multiply with what this brings them.

        ``ring_bytes``: at least those of the largest layer.
        """
        self.ring_bytes = ring_bytes
        self._layers = {one.layer: one for one in layers}
        self._device = device
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ring: torch.Tensor | None = None
        self._orders: OrderedDict[Hashable, list[StreamedLayer]] = OrderedDict()
        self._pass: _Pass | None = None
        for one in layers:
            method = StreamedLinearMethod(one.layer.quant_method, self)
            one.layer.quant_method = method  # type: ignore[assignment]
        self.to_device()

    def to_device(self) -> None:
        """Take the ring's memory, perhaps at another address: what was recorded is not valid."""
        self._ring = torch.empty(self.ring_bytes, dtype=torch.uint8, device=self._device)

    def leave_device(self) -> None:
        """Give the ring's memory back, until ``to_device``."""
        self._ring = None

    def passes(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """The same function of named arguments, with layers read ahead.

        Which layers it uses, in which order, may depend on what is no tensor in its arguments.
        """

        def run(**inputs: Any) -> Any:
            leaves, tree = pytree.tree_flatten(inputs)
            kind = tree, *(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
            self._pass = self._new_pass(self._orders.get(kind, []))
            try:
                found = evaluate(**inputs)
            finally:
                self._pass.end()
                order, self._pass = self._pass.order, None
            self._orders[kind] = order
            self._orders.move_to_end(kind)
            if len(self._orders) > MAX_ORDERS:
                self._orders.popitem(last=False)
            return found

        return run

    @contextlib.contextmanager
    def at_hand(self, layer: nn.Module) -> Iterator[None]:
        """Have the layer's parameters on the device."""
        one = self._layers[layer]
        present = self._pass or self._new_pass([])
        with present.place_of(one) as place, one.lying_in(place):
            yield

    def _new_pass(self, expected: Sequence[StreamedLayer]) -> "_Pass":
        assert self._ring is not None, "the model is awake"
        return _Pass(self._ring, self._copying, expected)


class StreamedLinearMethod:
    """vLLM's seam for how a linear multiplies: as ``method`` does, with the weight at hand."""

    def __init__(self, method: Any, stream: LayerStream) -> None:
        self.method = method
        self._stream = stream

    def at_hand(self, layer: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While this lasts, ``method`` may be used."""
        return self._stream.at_hand(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., this rank's inputs) → (..., its outputs)."""
        with self.at_hand(layer):
            found: torch.Tensor = self.method.apply(layer, x, bias)
        return found


@dataclass(eq=False)
class _Copy:
    """Of the layer that is used as number ``turn``, in the ring. Events: on a GPU."""

    turn: int
    start: int
    stop: int
    arrived: torch.cuda.Event | None
    used: torch.cuda.Event | None = None


class _Pass:
    """One evaluation: the layers that it uses, one after another, and those that are on their way.

    ``expected``: the order that is likely. From the first layer that is another one on, each is
    copied when it is used, to the ring's beginning.
    """

    def __init__(
        self,
        ring: torch.Tensor,
        copying: torch.cuda.Stream | None,
        expected: Sequence[StreamedLayer],
    ) -> None:
        self.order: list[StreamedLayer] = []
        self._ring = ring
        self._expected = expected
        self._num_copied = 0
        self._num_used = 0
        self._head = 0
        self._copies: deque[_Copy] = deque()  # in the order of their turns
        self._copying = copying if expected else None
        self._as_expected = bool(expected)
        if self._copying is not None:  # whatever used the ring before
            self._copying.wait_stream(torch.cuda.current_stream(ring.device))
        self._copy_ahead()

    def end(self) -> None:
        """Have the present stream wait for all copies: the ring can be used otherwise then."""
        if self._copying is not None:
            torch.cuda.current_stream(self._ring.device).wait_stream(self._copying)

    @contextlib.contextmanager
    def place_of(self, layer: StreamedLayer) -> Iterator[torch.Tensor]:
        """Where the layer's bytes are; to be used on the present stream."""
        turn = len(self.order)
        self.order.append(layer)
        if self._as_expected and (turn >= len(self._expected) or self._expected[turn] is not layer):
            self._as_expected = False
            self.end()
        if not self._as_expected:
            place = self._ring[: layer.host.nbytes]
            place.copy_(layer.host, non_blocking=True)
            yield place
            return
        # All before it are used, so that it has found room.
        copy = next(copy for copy in self._copies if copy.turn == turn)
        if copy.arrived is not None:
            torch.cuda.current_stream(self._ring.device).wait_event(copy.arrived)
        yield self._ring[copy.start : copy.stop]
        if self._copying is not None:
            copy.used = torch.cuda.current_stream(self._ring.device).record_event()
        self._num_used = turn + 1
        self._copy_ahead()

    def _copy_ahead(self) -> None:
        """Begin to copy the next layers, as far as there is room that nobody will use any more."""
        while self._num_copied < len(self._expected):
            host = self._expected[self._num_copied].host
            start = self._head if self._head + host.nbytes <= len(self._ring) else 0
            stop = start + host.nbytes
            before = None
            while any(copy.start < stop and start < copy.stop for copy in self._copies):
                if self._copies[0].turn >= self._num_used:
                    return
                before = self._copies.popleft().used
            arrived = self._copy(host, self._ring[start:stop], before)
            self._copies.append(_Copy(self._num_copied, start, stop, arrived))
            self._num_copied += 1
            self._head = stop

    def _copy(
        self, host: torch.Tensor, place: torch.Tensor, before: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """``before``: after which the place may be overwritten. Returns what the copy ends with."""
        if self._copying is None:
            place.copy_(host)
            return None
        with torch.cuda.stream(self._copying):
            if before is not None:
                self._copying.wait_event(before)
            place.copy_(host, non_blocking=True)
            return self._copying.record_event()
