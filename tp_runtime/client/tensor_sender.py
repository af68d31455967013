"""Puts the tensors of requests where the ranks find them."""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from ..config import MODEL_PATCHES, PER_EVALUATION_INPUTS
from ..wire.exchange import Exchange, TensorPlaces, dtype_name
from ..wire.protocol import (
    Evaluate,
    Evaluation,
    FillModelPatch,
    Hold,
    Patch,
    PatchedWeight,
    TensorRef,
    Unload,
    WeightPatch,
    pack_inputs,
)
from .batch_split import tensors_in
from .held_tensors import HeldTensors

HOLD_BYTES = 64 * 2**20  # what one request brings of the factors of patches, or of a model patch


class Asked(NamedTuple):
    """An evaluation that somebody asks for.

    ``inputs``: ComfyUI's forward arguments: ``x``, a tensor or several (the latents of a video and
    of its sound), and plain data with tensors. ``result_shapes``: one for each tensor of ``x``.
    ``known_as``: equal for evaluations of one sampling whose constant inputs have the same tensors,
    as far as their maker knows; None if it does not.
    """

    inputs: Mapping[str, Any]
    result_shapes: tuple[tuple[int, ...], ...]
    known_as: Hashable = None


class Placed(NamedTuple):
    """Evaluations that are placed, and can be sent.

    ``results``: the places where the ranks will put those of each evaluation. ``keys``: under which
    the ranks hold the tensors of the constant inputs, in their order. ``are_equal``: whether they
    do, where that was not looked at; it may wait for a GPU. ``brings``: whether there are some that
    the ranks did not hold before.
    """

    request: Evaluate
    results: list[list[torch.Tensor]]
    keys: list[int]
    are_equal: Callable[[], bool] | None = None
    brings: bool = False


class LaidOut(NamedTuple):
    """Evaluations that are to be placed in stream order.

    ``places``: of ``varying``, the inputs of each that differ at every evaluation, and of its
    ``results``. ``keys``: as of ``Placed``, of the ``constant`` inputs; ``tensors``: these inputs',
    by identity.
    """

    places: TensorPlaces
    varying: list[dict[str, Any]]
    results: list[tuple[TensorRef, ...]]
    keys: Sequence[int]
    constant: list[dict[str, Any]]
    tensors: dict[int, torch.Tensor]


def patches_in(asked: Sequence[Asked]) -> list[str]:
    """The names of the model patches that evaluations use."""
    listed = [patch for one in asked for patch in one.inputs.get(MODEL_PATCHES) or ()]
    return list(dict.fromkeys(patch["name"] for patch in listed))


class TensorSender:
    """Makes the requests that carry tensors, and knows which tensors the ranks hold already.

    A request that was made has to be sent, or ``roll_back`` to be called, before the next is made.
    """

    def __init__(self) -> None:
        self.exchange = Exchange.create()
        self._held = HeldTensors()
        # Factors of patches by identity, which the tensor itself keeps from being given again.
        self._factors: dict[int, tuple[TensorRef, torch.Tensor]] = {}
        self._factors_of: dict[str, set[int]] = {}  # model → identities that its patches use
        self._keys = itertools.count(1)

    # --- evaluating ------------------------------------------------------------------------------

    def place_evaluations(self, call: int, model: str, asked: Sequence[Asked]) -> Placed:
        """Evaluations whose inputs are there when this returns."""
        self.exchange.wait()
        places = TensorPlaces()
        varying, results = self._place_varying(asked, places)
        places.write_to(self.exchange)  # begun first: comparing the rest waits for the GPU anyway
        constant, tensors = _constant(asked)
        held = dict(zip(tensors, self._held.find(list(tensors.values())), strict=True))
        brings = 0 in held.values()
        trees = [self._place(inputs, places, held) for inputs in constant]
        places.write_to(self.exchange)
        self.exchange.wait()
        keys = list(held.values())
        request = Evaluate(
            call=call,
            model=model,
            evaluations=_evaluations(varying, trees, results),
            drop=self._held.evict(set(keys)),
            exchange_bytes=self.exchange.size,
        )
        return Placed(request, self._views(results), keys, brings=brings)

    def laid_out(
        self, asked: Sequence[Asked], keys: Sequence[int], device: torch.device
    ) -> LaidOut | None:
        """For ``place_in_stream_order``; None: that cannot place these.

        It can if they bring nothing to be held, nothing that is on another device, and need no more
        room. ``keys``: those of ``Placed``, of evaluations whose constant inputs are known to have
        had the same tensors.
        """
        places = TensorPlaces()
        varying, results = self._place_varying(asked, places)
        constant, tensors = _constant(asked)
        fits = (
            places.size <= self.exchange.size
            and all(tensor.device == device for tensor in tensors_in(_varying(asked)))
            and self._held.may_be(keys, list(tensors.values()), device)
        )
        return LaidOut(places, varying, results, keys, constant, tensors) if fits else None

    def place_in_stream_order(
        self, call: int, model: str, laid_out: LaidOut, device: torch.device
    ) -> Placed:
        """Evaluations whose inputs will be there when the device's current stream gets there.

        What the stream was given before must be what takes the results of the evaluations before
        from their places: then nobody uses these any more.
        """
        places, varying, results, keys, constant, tensors = laid_out
        places.write_to(self.exchange)
        self.exchange.say_inputs(device, call)
        held = dict(zip(tensors, keys, strict=True))
        trees = [self._place(inputs, places, held) for inputs in constant]
        request = Evaluate(
            call=call,
            model=model,
            evaluations=_evaluations(varying, trees, results),
            drop=[],
            exchange_bytes=self.exchange.size,
            in_stream_order=True,
        )
        # Behind what the ranks wait for.
        are_equal = self._held.begin_to_compare(keys, list(tensors.values()))
        return Placed(request, self._views(results), list(keys), are_equal)

    def _place_varying(
        self, asked: Sequence[Asked], places: TensorPlaces
    ) -> tuple[list[dict[str, Any]], list[tuple[TensorRef, ...]]]:
        """Room for what differs at every evaluation, and for the results of each."""
        trees = [self._place(inputs, places, None) for inputs in _varying(asked)]
        results = []
        for one in asked:
            of_one = []
            for latent, shape in zip(tensors_in(one.inputs["x"]), one.result_shapes, strict=True):
                offset = places.reserve(math.prod(shape) * latent.itemsize)
                of_one.append(TensorRef(shape, dtype_name(latent.dtype), offset))
            results.append(tuple(of_one))
        return trees, results

    def _views(self, results: Sequence[Sequence[TensorRef]]) -> list[list[torch.Tensor]]:
        return [[self.exchange.view(ref) for ref in refs] for refs in results]

    def sent(self) -> None:
        """The request was sent: the ranks hold its tensors now."""
        self._held.commit()

    def roll_back(self) -> None:
        """The request was not sent."""
        self._held.roll_back()

    def forget_held(self) -> None:
        """The ranks hold no conditioning any more: a model leaves their devices."""
        self._held.clear()

    def _place(self, value: Any, places: TensorPlaces, held: dict[int, int] | None) -> Any:
        """``value`` with every tensor replaced by a reference to it.

        ``held``: for tensors that the ranks are to keep, identity → key, 0 until they have it.
        """
        if isinstance(value, torch.Tensor):
            if held is None:
                return places.place(value)
            if held[id(value)]:
                return TensorRef(tuple(value.shape), dtype_name(value.dtype), -1, held[id(value)])
            held[id(value)] = self._held.add(value)
            return places.place(value, held[id(value)])
        if isinstance(value, Mapping):
            return {k: self._place(v, places, held) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._place(v, places, held) for v in value]
        return value

    # --- model patches ---------------------------------------------------------------------------

    def fill(self, call: int, model: str, tensors: Mapping[str, torch.Tensor]) -> FillModelPatch:
        """The request that gives the ranks these tensors of a model patch."""
        self.exchange.wait()
        places = TensorPlaces()
        refs = {name: places.place(tensor) for name, tensor in tensors.items()}
        places.write_to(self.exchange)
        self.exchange.wait()
        return FillModelPatch(call, model, refs, self.exchange.size)

    # --- patching --------------------------------------------------------------------------------

    def not_held(self, weights: Mapping[str, PatchedWeight]) -> Iterator[list[torch.Tensor]]:
        """The factors that the ranks do not hold yet, in portions for one ``hold`` each."""
        portion: list[torch.Tensor] = []
        size = 0
        new = {id(factor): factor for factor in _factors(weights)}
        for identity, factor in new.items():
            if identity in self._factors:
                continue
            if portion and size + factor.nbytes > HOLD_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(factor)
            size += factor.nbytes
        if portion:
            yield portion

    def hold(self, call: int, factors: list[torch.Tensor]) -> Hold:
        """The request that gives the ranks these tensors."""
        self.exchange.wait()
        places = TensorPlaces()
        refs = [places.place(factor, next(self._keys)) for factor in factors]
        places.write_to(self.exchange)
        self.exchange.wait()
        for ref, factor in zip(refs, factors, strict=True):
            self._factors[id(factor)] = (ref, factor)
        return Hold(call, refs, self.exchange.size)

    def patch(self, call: int, model: str, weights: Mapping[str, PatchedWeight]) -> Patch:
        """The request for patches whose factors the ranks hold; it drops the unused ones."""
        self._factors_of[model] = {id(factor) for factor in _factors(weights)}
        packed = {name: self._packed(weight) for name, weight in weights.items()}
        return Patch(call, model, packed, self._unused_factors())

    def unload(self, call: int, model: str) -> Unload:
        """The request that frees a model; it drops the factors that no other model uses."""
        self._factors_of.pop(model, None)
        return Unload(call, model, self._unused_factors())

    def _unused_factors(self) -> list[int]:
        """Forget those that no model's patches use; their keys, for the ranks to drop."""
        used = set().union(*self._factors_of.values())
        dropped = [self._factors.pop(unused) for unused in self._factors.keys() - used]
        return [ref.key for ref, _ in dropped]

    def _packed(self, weight: PatchedWeight) -> PatchedWeight:
        stages = tuple(tuple(map(self._packed_patch, stage)) for stage in weight.stages)
        return msgspec.structs.replace(weight, stages=stages)

    def _packed_patch(self, patch: WeightPatch) -> WeightPatch:
        factors = tuple(
            pack_inputs(self._factors[id(factor)][0])
            if isinstance(factor, torch.Tensor)
            else factor
            for factor in patch.factors
        )
        return msgspec.structs.replace(patch, factors=factors)


def _varying(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Of each evaluation, the inputs that change at every evaluation."""
    return [
        {name: value for name, value in one.inputs.items() if name in PER_EVALUATION_INPUTS}
        for one in asked
    ]


def _constant(asked: Sequence[Asked]) -> tuple[list[dict[str, Any]], dict[int, torch.Tensor]]:
    """Of each evaluation, the inputs that do not; and their tensors by identity, in order."""
    inputs = [
        {name: value for name, value in one.inputs.items() if name not in PER_EVALUATION_INPUTS}
        for one in asked
    ]
    return inputs, {id(tensor): tensor for tensor in tensors_in(inputs)}


def _evaluations(
    varying: Sequence[dict[str, Any]],
    constant: Sequence[dict[str, Any]],
    results: Sequence[tuple[TensorRef, ...]],
) -> list[Evaluation]:
    return [
        Evaluation(pack_inputs(some | others), refs)
        for some, others, refs in zip(varying, constant, results, strict=True)
    ]


def _factors(weights: Mapping[str, PatchedWeight]) -> Iterator[torch.Tensor]:
    for weight in weights.values():
        for stage in weight.stages:
            for patch in stage:
                yield from (f for f in patch.factors if isinstance(f, torch.Tensor))
