"""Puts the tensors of requests where the ranks find them."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import torch

from ..config import MODEL_PATCHES
from ..wire.exchange import Exchange, TensorPlaces, dtype_name
from ..wire.protocol import (
    PER_EVALUATION_INPUTS,
    Evaluate,
    Evaluation,
    FillModelPatch,
    Hold,
    Patch,
    PatchedWeight,
    TensorRef,
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
    """

    inputs: Mapping[str, Any]
    result_shapes: tuple[tuple[int, ...], ...]


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

    def place_evaluations(
        self, call: int, model: str, asked: Sequence[Asked]
    ) -> tuple[Evaluate, list[list[torch.Tensor]]]:
        """The request, and the places where the ranks will put the results of each evaluation."""
        self.exchange.wait()
        places = TensorPlaces()
        trees, results = [], []
        for inputs, result_shapes in asked:
            trees.append(self._place(_part(inputs, per_evaluation=True), places, None))
            of_one = []
            for latent, shape in zip(tensors_in(inputs["x"]), result_shapes, strict=True):
                offset = places.reserve(math.prod(shape) * latent.itemsize)
                of_one.append(TensorRef(shape, dtype_name(latent.dtype), offset))
            results.append(tuple(of_one))
        places.write_to(self.exchange)  # begun first: comparing the rest waits for the GPU anyway
        constant = [_part(inputs, per_evaluation=False) for inputs, _ in asked]
        to_hold = {id(tensor): tensor for tensor in tensors_in(constant)}
        held = dict(zip(to_hold, self._held.find(list(to_hold.values())), strict=True))
        trees = [
            tree | self._place(inputs, places, held)
            for tree, inputs in zip(trees, constant, strict=True)
        ]
        places.write_to(self.exchange)
        self.exchange.wait()
        evaluations = [
            Evaluation(pack_inputs(tree), refs) for tree, refs in zip(trees, results, strict=True)
        ]
        request = Evaluate(
            call=call,
            model=model,
            evaluations=evaluations,
            drop=self._held.evict(set(held.values())),
            exchange_bytes=self.exchange.size,
        )
        return request, [[self.exchange.view(ref) for ref in refs] for refs in results]

    def sent(self) -> None:
        """The request was sent: the ranks hold its tensors now."""
        self._held.commit()

    def roll_back(self) -> None:
        """The request was not sent."""
        self._held.roll_back()

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
        used = set().union(*self._factors_of.values())
        dropped = [self._factors.pop(unused) for unused in self._factors.keys() - used]
        return Patch(call, model, packed, [ref.key for ref, _ in dropped])

    def forget_patches(self, model: str) -> None:
        """The model is unloaded: its factors go with the next ``patch``."""
        self._factors_of.pop(model, None)

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


def _part(inputs: Mapping[str, Any], *, per_evaluation: bool) -> dict[str, Any]:
    """The inputs that change at every evaluation, or the inputs that do not."""
    return {
        name: value
        for name, value in inputs.items()
        if (name in PER_EVALUATION_INPUTS) == per_evaluation
    }


def _factors(weights: Mapping[str, PatchedWeight]) -> Iterator[torch.Tensor]:
    for weight in weights.values():
        for stage in weight.stages:
            for patch in stage:
                yield from (f for f in patch.factors if isinstance(f, torch.Tensor))
