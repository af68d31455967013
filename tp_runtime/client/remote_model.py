"""A model on a group, as the nodes hold it."""

import contextlib
import functools
import hashlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from ..config import PER_EVALUATION_INPUTS, GroupConfig, ModelSpec, device_names
from ..layouts.choice import native_workload
from ..layouts.room import bytes_beside
from ..layouts.step_history import StepRecords, Workload, times_of
from ..recognise import CheckpointInfo
from ..wire.exchange import dtype_of
from ..wire.protocol import Load, PatchedWeight
from .background import in_background
from .batch_split import Inputs, Latents, divide_all, tensors_in
from .call import OnProgress
from .evaluated import Evaluated
from .group import Group
from .inspection import checkpoint_info
from .poll import Poll
from .remote_patch import RemotePatch, Tensors
from .tensor_sender import Asked

if TYPE_CHECKING:
    from .engine import Engine


class RemoteModel:
    """A model on a group, as the nodes hold it. Cheap: nothing is started before it is needed.

    Equal specs on one group share their shards, which are freed when nobody holds such a model
    any more.
    """

    def __init__(self, spec: ModelSpec, group: Group, records: StepRecords) -> None:
        self.spec = spec
        self.info: CheckpointInfo = checkpoint_info(spec.path)
        self.info.check_layout(group.config.layout)
        digest = hashlib.blake2s(msgspec.json.encode(spec), digest_size=6).hexdigest()
        self.name = f"{Path(spec.path).name}@{digest}"
        self.label = self.info.label
        self.version: Hashable = None
        self.patches: Mapping[str, PatchedWeight] = {}
        self.sizes = self.info.sizes  # with the patches
        self.used_at_start = 0  # which start of its group it was loaded after, by ensure_loaded
        self._of_step: list[Evaluated] | None = None  # of the ``step`` that is computed now
        self._group = group
        self._records = records
        self._model_patches: weakref.WeakSet[RemotePatch] = weakref.WeakSet()
        group.add_user(self)

    @property
    def group_config(self) -> GroupConfig:
        return self._group.config

    @property
    def group_id(self) -> str:
        return self._group.id

    def patch(self, version: Hashable, patches: Mapping[str, PatchedWeight]) -> None:
        """From now on, evaluate the model with these changes of the file's weights.

        ``patches``: name of a tensor in the file → what changes it, with tensors as factors. The
        ranks are told when the model is used next. Equal versions mean equal patches; None, none.

        Raises:
            InputError: one makes a weight larger whose shape is fixed (``CheckpointInfo.widened``).
        """
        sizes = self.info.sizes
        for name, weight in patches.items():
            if weight.shape is not None:  # there is one such weight at most
                sizes = self.info.widened(name, weight.shape)
        self.version = version
        self.patches = patches
        self.sizes = sizes

    def model_patch(self, kind: str, tensors: Tensors) -> RemotePatch:
        """A model patch for evaluations of this model.

        ``kind``: ComfyUI's class of it, one of the family's ``model_patches``. ``tensors``: gives
        its tensors, by ComfyUI's names; called whenever the ranks have to get them.

        Raises:
            InputError: they are not all there, or those of a patch for other models.
        """
        tp_size = self.group_config.tp_size
        patch = RemotePatch(self.info, self.spec.compute_dtype, tp_size, kind, tensors)
        self._group.add_user(patch)
        self._model_patches.add(patch)
        return patch

    def load(
        self, engine: "Engine", poll: Poll | None, on_progress: OnProgress | None
    ) -> tuple[list[int], list[int]]:
        """Have the ranks of an engine hold it; see ``Holdable``. Its group calls this.

        Raises:
            CheckpointError, SizeError, and what ``Engine.call`` raises.
        """

        def make(call: int) -> Load:
            return Load(call, self.name, self.spec, self._weight_limit(), self._computed_bytes)

        values = engine.call(make, poll=poll, on_progress=on_progress)
        return (
            [value["resident_bytes"] for value in values],
            [value["streamed_bytes"] for value in values],
        )

    def ensure_loaded(
        self, poll: Poll | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """Have the group running and the weights on its devices. Returns at once if they are.

        ``poll`` is called every 10 ms or so while waiting; what it raises ends the wait (the
        ranks go on loading for themselves). ``on_progress(done, total)`` gets bytes, summed over
        the ranks.

        Raises:
            GroupStartError, CheckpointError, and what ``Engine.call`` raises.
        """
        self._group.use(self, poll, on_progress)

    def evaluate(
        self, inputs: Inputs, poll: Poll | None = None, *, known_as: Hashable = None
    ) -> Latents:
        """Evaluate the model once; see ``evaluate_all``."""
        return self.evaluate_all([inputs], poll, known_as=[known_as])[0]

    def evaluate_all(
        self,
        inputs_of_each: Sequence[Inputs],
        poll: Poll | None = None,
        *,
        known_as: Sequence[Hashable] | None = None,
    ) -> list[Latents]:
        """Evaluate the model once with each of the inputs. Call ``ensure_loaded`` before.

        The batch groups work on different evaluations, or on different items of a batch. Inputs
        are as in ``Asked``, results as in ``Engine.evaluate``: within ``ahead`` they may not be
        computed yet. A result is a tensor, or a list of them, as ``inputs["x"]`` is, and of that
        shape, but for the channels of a model that takes more of them (masks, control images) than
        it predicts.

        ``known_as``: for each of the inputs, what ``Asked.known_as`` says of it.

        Raises:
            InputError: inputs that do not fit, and nothing was sent; or other tensors than
                ``known_as`` has said.
            NotFiniteError: a result has values that are NaN or infinite.
        """
        dtype = self.spec.compute_dtype
        given, known_as = inputs_of_each, known_as or len(inputs_of_each) * [None]
        inputs_of_each = [self.info.checked_inputs(one, dtype, self.sizes) for one in given]
        # What was made of a latent or a timestep is another tensor every time.
        known_as = [
            known if _are_among(inputs, before) else None
            for inputs, before, known in zip(inputs_of_each, given, known_as, strict=True)
        ]
        batch_groups = self.group_config.batch_groups
        divided = divide_all(inputs_of_each, batch_groups, self.sizes.undivided_inputs)
        asked = [
            Asked(part, self._result_shapes(part), None if known is None else (known, number))
            for parts, known in zip(divided, known_as, strict=True)
            for number, part in enumerate(parts)
        ]
        results: list[list[torch.Tensor]] = []
        for start in range(0, len(asked), batch_groups):
            evaluated = self._group.evaluate(self, asked[start : start + batch_groups], poll)
            if self._of_step is not None:
                self._of_step.append(evaluated)
            results += evaluated.results
        remaining = iter(results)
        together = [_joined(list(itertools.islice(remaining, len(parts)))) for parts in divided]
        return [
            latents[0] if isinstance(inputs["x"], torch.Tensor) else latents
            for latents, inputs in zip(together, inputs_of_each, strict=True)
        ]

    def connected(
        self, caption: torch.Tensor, poll: Poll | None = None, *, unprocessed: bool
    ) -> torch.Tensor:
        """What the model makes of a caption before a generation; see ``Sizes.connected``.

        Raises:
            InputError: the caption is of another shape or dtype.
        """
        shape = self.info.sizes.connected(tuple(caption.shape), unprocessed=unprocessed)
        if shape is None:
            return caption
        evaluated = self._group.evaluate(self, [Asked({"x": caption}, (shape,))], poll)
        ((found,),) = evaluated.results
        return found

    @contextlib.contextmanager
    def step(self, workload: Callable[[], Workload]) -> Iterator[None]:
        """Within, evaluations are those of one step of a sampler, with that ``workload``.

        How long the ranks took for it is remembered, beyond this process, as soon as all of it is
        settled. Nothing is of a step without an evaluation, or with an error.
        """
        of_step: list[Evaluated] = []
        before, self._of_step = self._of_step, of_step
        try:
            yield
        finally:
            self._of_step = before
        if not of_step:
            return
        of_what = workload()

        def record() -> None:
            self._record_step(of_what, 1000 * sum(one.seconds for one in of_step))

        of_step[-1].when_settled(record)  # each is settled before the next is asked for

    def _record_step(self, workload: Workload, ms: float) -> None:
        config = self.group_config
        # What is known is known of this machine; and "off" is for finding faults, not for work.
        if config.where == "ray" or self.spec.optimize == "off":
            return
        itemsize = self.info.held_itemsize(dtype_of(self.spec.weight_dtype).itemsize)
        times = times_of(device_names(config.devices), self.spec.precision, itemsize)
        self._records.add(self.spec.path, times, workload, config.layout, ms)

    def _result_shapes(self, inputs: Inputs) -> tuple[tuple[int, ...], ...]:
        first, *others = (tuple(latent.shape) for latent in tensors_in(inputs["x"]))
        batch, channels, *size = first
        return (batch, self.sizes.geometry.out_channels or channels, *size), *others

    def loaded_bytes(self) -> list[int]:
        """Bytes that the weights take on each rank's device now, with its model patches'."""
        each = [self._group.bytes_on_devices(name) for name in self._names()]
        return [sum(of_rank) for of_rank in zip(*each, strict=True)]

    def planned_bytes(self) -> int:
        """Bytes that the weights will take on each rank's device, to within a few percent."""
        return self._share_bytes() - self.planned_streaming()

    def planned_streaming(self) -> int:
        """Bytes that stay in the host's memory for each rank, to within a few percent.

        0 on a Ray cluster, where it is not known how much memory the GPUs have, unless they were
        given a limit.
        """
        limit = self._weight_limit()
        return max(0, self._share_bytes() - limit) if limit else 0

    def bytes_of(self, weights: Iterable[str]) -> int:
        """See ``Holdable``; without what padding adds."""
        return self.info.bytes_of(weights, dtype_of(self.spec.weight_dtype).itemsize)

    def _weight_limit(self) -> int:
        return self.group_config.weight_limit(self._computed_bytes)

    @functools.cached_property
    def _computed_bytes(self) -> int:
        """What each device needs for one picture or video of the model's usual size."""
        workload = native_workload(self.info)
        return int(bytes_beside(self.info.sizes, workload, self.group_config.layout))

    def _share_bytes(self) -> int:
        itemsize = dtype_of(self.spec.weight_dtype).itemsize
        return self.info.weight_bytes(itemsize) // self.group_config.tp_size

    def _names(self) -> list[str]:
        return [self.name, *(patch.name for patch in list(self._model_patches))]

    def sleep(self, poll: Poll | None = None, *, wait: bool = True) -> None:
        """Move the weights, those of its model patches, too, to the host's memory.

        Or free them if that has no room. ``wait`` False: in the background, as soon as the ranks
        have done what they are at.
        """
        if wait:
            self._sleep(self._names(), poll)
        else:
            names = self._names()
            try:
                in_background(self._sleep, names)
            except RuntimeError:  # there are too many threads: then now
                self._sleep(names, poll)

    def _sleep(self, names: Sequence[str], poll: Poll | None = None) -> None:
        for name in names:
            self._group.sleep(name, poll)


def _are_among(some: Inputs, others: Inputs) -> bool:
    """Whether the constant tensors of some inputs are tensors of others, and none was made of
    these.
    """
    known = {id(tensor) for tensor in tensors_in(others)}
    constant = [value for name, value in some.items() if name not in PER_EVALUATION_INPUTS]
    return all(id(tensor) in known for tensor in tensors_in(constant))


def _joined(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The latents of the parts of a batch as those of all of it."""
    if len(parts) == 1:
        return parts[0]
    return [torch.cat(of_parts) for of_parts in zip(*parts, strict=True)]
