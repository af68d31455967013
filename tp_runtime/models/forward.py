"""What evaluates a sharded model as ComfyUI's forward does: the part that all families share."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..config import MODEL_PATCHES, PER_EVALUATION_INPUTS
from ..errors import InputError
from ..fault_points import reach
from ..gpu.epilogue import Epilogue, Product
from ..gpu.graphs import optimising
from .family import Family, Sizes
from .inputs import OPTIONS
from .layers import residual_norm
from .token_shares import SequenceGroup, TokenShares

MEMO_BYTES = 4 * 2**30

Conditioning = dict[str, Any]  # tensors, lists of them, and plain data that changes the result
Prediction = torch.Tensor | list[torch.Tensor]  # as ``x`` is

# ComfyUI's name of the kind of a block, "double_block" or "single_block", and its number.
BlockName = tuple[str, int]
Part = TypeVar("Part")


class Collectives(SequenceGroup, Protocol):
    """What a forward may do with the other ranks.

    Sums and parts put together are of its tensor-parallel group.
    """

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Put the ranks' parts of the last axis together: (..., n) on each → (..., n · tp_size)."""
        ...

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, element by element, equal on every one."""
        ...

    def summed(self, products: Sequence[Product]) -> list[torch.Tensor]:
        """What row-parallel linears make of their inputs, summed over the ranks.

        It may be rounded on its way, but equally on every rank.
        """
        ...


class Reduction(Protocol):
    """``ShardedForward.join`` with the sum over the ranks inside (``gpu/reduction.py``)."""

    def __call__(
        self, products: Sequence[Product], tokens: torch.Tensor, epilogue: Epilogue
    ) -> torch.Tensor:
        """The second result of ``join``."""
        ...


def memo_bytes(device: torch.device) -> int:
    """How much memory what is remembered may take: 4 GiB, or an eighth of a larger GPU's."""
    if device.type != "cuda":
        return MEMO_BYTES
    return max(MEMO_BYTES, torch.cuda.get_device_properties(device).total_memory // 8)


class Memo:
    """Conditioning of the last few generations, by what it was computed from.

    Its key is made of the names under which the rank holds the tensors, so an entry serves every
    evaluation of a generation. Beyond ``limit_bytes`` the least recently used go first; the last
    one stays, however large it is.

    Ranks that wait for one another in what is computed have to forget the same: they have one
    limit, and ``largest`` says of an entry's bytes those of the rank that has the most.
    """

    def __init__(self, limit_bytes: int = MEMO_BYTES, largest: Callable[[int], int] = int) -> None:
        self._limit_bytes = limit_bytes
        self._largest = largest
        self._entries: OrderedDict[Hashable, tuple[Conditioning, int]] = OrderedDict()
        self._bytes = 0
        self._part: tuple[Hashable, Sequence[torch.Tensor], Any] | None = None

    def get(self, key: Hashable, compute: Callable[[], Conditioning]) -> Conditioning:
        """What ``compute`` returned for this key, or returns now."""
        if key not in self._entries:
            found = compute()
            num_bytes = self._largest(_num_bytes(found))
            self._entries[key] = found, num_bytes
            self._bytes += num_bytes
            while self._bytes > self._limit_bytes and len(self._entries) > 1:
                _, (_, dropped) = self._entries.popitem(last=False)
                self._bytes -= dropped
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def part(
        self, key: Hashable, given: Sequence[torch.Tensor], compute: Callable[[], Part]
    ) -> Part:
        """What ``compute`` makes of these tensors, or made of equal ones under this key.

        What entries have in common, as those of a step's two conditions. Only the last one is kept,
        in memory that the entries share; it stays when they go.
        """
        last = self._part
        if last is not None and last[0] == key and _all_equal(last[1], given):
            kept: Part = last[2]
            return kept
        self._part = last = None
        found = compute()
        self._part = key, list(given), found
        return found


def _all_equal(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _num_bytes(conditioning: Conditioning) -> int:
    leaves = pytree.tree_leaves(conditioning)
    return sum(one.nbytes for one in leaves if isinstance(one, torch.Tensor))


class ShardedForward:
    """A sharded module with the forward pass that ComfyUI expects of it, in two halves.

    ``condition`` is what stays the same over a generation (refined text, positions, ...): a
    function of every input but ``timesteps`` and of ``x`` only through its shape. ``evaluate`` is
    the rest: tensors in, tensors out, one for each latent, so that it can be recorded; ``run`` is
    what runs it. What ``evaluate`` takes beside what ``condition`` found, if it has an argument for
    it: ``skip``, the blocks to leave out; ``model_patches`` and ``control``, those of ComfyUI.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        model: nn.Module,
        sizes: Sizes,
        collectives: Collectives,
        reduction: Reduction | None = None,
    ) -> None:
        self.model: Any = model
        self.sizes: Any = sizes
        self.collectives = collectives
        self.run: Callable[..., Prediction] = self.evaluate
        self.memo = Memo()
        self.model_patches: Mapping[str, Any] = {}  # those that the rank holds, by their names
        self._reduction = reduction

    @classmethod
    def build(cls, sizes: Sizes) -> nn.Module:
        """The module of that size. Call it under ``torch.device("meta")``.

        Where diffusers derives the sizes of a linear from others, the file decides.
        """
        import diffusers

        module: nn.Module = getattr(diffusers, cls.family.diffusers_class)(**sizes.for_diffusers())
        linears = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear)]
        for path, linear in linears:
            place = sizes.table.places.get(f"{path}.weight")
            if place is None:  # a subclass takes it out
                continue
            inputs, outputs = sizes.table.file_tensors[place.name][1], place.stop - place.start
            if (linear.in_features, linear.out_features) != (inputs, outputs):
                module.set_submodule(path, nn.Linear(inputs, outputs, linear.bias is not None))
        return module

    @property
    def label(self) -> str:
        return self.family.label

    def condition(self, *args: Any, **inputs: Any) -> Conditioning:
        """The tensors that ``evaluate`` takes besides those that differ at every evaluation.

        ``transformer_options`` are given to those that name them.

        Raises:
            InputError: an input does not fit in a way that its declaration cannot tell.
        """
        raise NotImplementedError

    def connect(self, caption: torch.Tensor) -> torch.Tensor:
        """What the model makes of a caption before a generation: see ``Sizes.connected``."""
        raise NotImplementedError

    def check_control(
        self, batch: int, conditioning: Conditioning, control: Mapping[str, Any]
    ) -> None:
        """Refuse a ControlNet's residuals that do not fit. Called if ``evaluate`` takes some.

        Raises:
            InputError: a residual is of another shape than it is added to.
        """
        raise NotImplementedError

    def check_model_patches(self, x: torch.Tensor, listed: Sequence[Mapping[str, Any]]) -> None:
        """Refuse pictures of model patches (``MODEL_PATCHES``) that do not fit the latent.

        Raises:
            InputError: one has another shape.
        """
        raise NotImplementedError

    def evaluate(self, *args: Any, **inputs: Any) -> Prediction:
        """The model's prediction, in the dtype of ``x``; ``timesteps`` are fp32.

        Of several latents in a list (a video's, and its sound's), a list of as many.
        """
        raise NotImplementedError

    def shares(self, *lengths: int) -> TokenShares:
        """Which of streams of so many tokens each rank has."""
        return TokenShares(self.collectives, lengths)

    def shared(self, *streams: torch.Tensor) -> tuple[TokenShares, torch.Tensor]:
        """The shares of streams (B, L, D), and this rank's tokens, a stream's behind another's.

        These are a copy, since ``join`` changes them.
        """
        shares = self.shares(*(one.shape[1] for one in streams))
        own = [shares.own_of(one, index) for index, one in enumerate(streams)]
        return shares, torch.cat(own, dim=1)

    def modulations(
        self, linears: Sequence[Any], activated: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Column-parallel linears on (B, n), with one gather for all: (linears, B, count, D)."""
        width = self.sizes.dim
        if not linears:
            return activated.new_empty(0, activated.shape[0], count, width)
        local = torch.stack([linear(activated) for linear in linears])
        whole = self.collectives.gather(local)[..., : count * width]
        return whole.unflatten(-1, (count, width))

    def join(
        self, products: Sequence[Product], tokens: torch.Tensor, epilogue: Epilogue
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows row-parallel linears: ``residual_norm`` of each stream's tokens.

        ``products``: for each of S streams, which lie behind one another in ``tokens`` (B, L, D),
        the linear and its input. Returns the new tokens, and their norm, or as much again if the
        epilogue has none.

        ``tokens`` changes in place, and is good for the next ``join`` only: fast, a rank has its
        own rows of it.
        """
        assert tokens.is_contiguous(), "a fused sum takes its rows for one behind another"
        if self._reduction is not None and optimising():
            return tokens, self._reduction(products, tokens, epilogue)
        updates = self.collectives.summed(products)
        if late := epilogue.num_late:
            updates += updates.pop().tensor_split((-late,), dim=1)
        normed = []
        start = 0
        for stream, update in enumerate(updates):
            here = tokens[:, start : start + update.shape[1]]
            total, of_stream = residual_norm(here, update, epilogue.of_stream(stream))
            here.copy_(total)
            normed.append(of_stream)
            start += update.shape[1]
        return tokens, normed[0] if len(normed) == 1 else torch.cat(normed, dim=1)

    def __call__(self, inputs: Mapping[str, Any], key: Hashable) -> Prediction:
        """Evaluate the model. Inputs of one ``key`` have equal conditioning.

        Without ``timesteps``, ``x`` is a caption that is to be made ready.

        ``inputs``: as ``models.inputs.checked_inputs`` gives them.

        Raises:
            InputError: an input does not fit in a way that its declaration cannot tell.
        """
        inputs = dict(inputs)
        if "timesteps" not in inputs:
            return self.connect(inputs["x"])
        x, timesteps = inputs["x"], inputs.pop("timesteps")
        others = [name for name in PER_EVALUATION_INPUTS if name != "x" and name in inputs]
        per_evaluation = {name: inputs.pop(name) for name in others}
        latents = [x] if isinstance(x, torch.Tensor) else x
        key = (key, *((tuple(latent.shape), latent.dtype) for latent in latents))
        conditioning = self.memo.get(key, lambda: self._conditioned(inputs))
        if "control" in per_evaluation:
            self.check_control(latents[0].shape[0], conditioning, per_evaluation["control"])
        return self.run(x=x, timesteps=timesteps, **conditioning, **per_evaluation)

    def _conditioned(self, inputs: dict[str, Any]) -> Conditioning:
        """What ``condition`` finds, and what else ``evaluate`` takes for a whole generation."""
        assert not optimising(), "what is remembered must not lie in memory of a reduction"
        reach("compile")
        found: Conditioning = {}
        if skip := skipped_blocks(inputs.get(OPTIONS)):
            self._check_skip()
            found["skip"] = skip
        if patches := inputs.pop(MODEL_PATCHES, ()):
            self.check_model_patches(inputs["x"], patches)
            found[MODEL_PATCHES] = patches
        if OPTIONS not in inspect.signature(self.condition).parameters:
            inputs.pop(OPTIONS, None)
        return self.condition(**inputs) | found

    def _check_skip(self) -> None:
        if "skip" not in inspect.signature(self.evaluate).parameters:
            raise InputError(
                f"{self.label} on the process group cannot leave blocks out (skip-layer guidance). "
                "Remove or bypass that node, or load the model with the stock 'Load Diffusion "
                "Model' node."
            )


def skipped_blocks(transformer_options: Mapping[str, Any] | None) -> tuple[BlockName, ...]:
    """The blocks that a node has left out: ``skip_blocks`` of the options, by kind."""
    by_kind = option(transformer_options, "skip_blocks")
    return tuple((kind, index) for kind, indices in by_kind.items() for index in indices)


def kept_blocks(blocks: Sequence[Any], skip: Collection[BlockName]) -> list[tuple[int, Any]]:
    """The others of a model with one kind of blocks, with their numbers."""
    left_out = {number for _, number in skip}
    return [(number, block) for number, block in enumerate(blocks) if number not in left_out]


def option(transformer_options: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """A dictionary among ComfyUI's options; empty if there is none."""
    found: Mapping[str, Any] = (transformer_options or {}).get(name) or {}
    return found


def unsupported(label: str, what: str, value: object, allowed: Iterable[str]) -> InputError:
    """For a choice that the model's forward does not know."""
    return InputError(
        f"{label} on the process group does not support the {what} '{value}'. Supported: "
        f"{', '.join(allowed)}."
    )
