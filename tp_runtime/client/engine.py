"""What one may ask of a process group, from ComfyUI's process.

Callers take turns. They wait on the request they made and may abandon it at any time; the ranks
then finish it for themselves and the next request waits for that. Only of evaluations that follow
one another in stream order (``evaluated.ahead``), one is sent while another is under way.
"""

import functools
import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..config import GroupConfig, ModelPatchSpec
from ..errors import TPRuntimeError
from ..wire import stream_wait
from ..wire.protocol import LoadModelPatch, PatchedWeight, Request, Sleep, encode
from . import failures
from .batch_split import tensors_in
from .call import Call, OnProgress
from .evaluated import Evaluated, may_be_ahead, note_ahead, remembered, settle_all
from .evaluation_times import EvaluationTimes, shapes_of
from .group_state import State
from .launch.launcher import Launcher, Rank
from .launch.local import LocalLauncher
from .launch.ray import RayLauncher
from .poll import Poll, acquired
from .rank_processes import RankProcesses
from .tensor_sender import HOLD_BYTES, Asked, LaidOut, Placed, TensorSender

LOOKS = 2  # at constant inputs, before they are taken for the same unlooked at
LOOKED_AT = 64  # kinds of evaluations of a sampling, the last ones: a step has a handful


class _LookedAt(NamedTuple):
    """Under which keys the ranks held the constant inputs, so many times in a row."""

    keys: list[int]
    times: int


def buffers_for(asked: Sequence[Asked], device: torch.device) -> list[list[torch.Tensor]]:
    """Tensors on a device that the results of each evaluation fit."""
    return [
        [
            torch.empty(shape, dtype=latent.dtype, device=device)
            for latent, shape in zip(tensors_in(one.inputs["x"]), one.result_shapes, strict=True)
        ]
        for one in asked
    ]


def _looked_at() -> dict[Hashable, _LookedAt]:
    """By what evaluations are known as, the last ones last."""
    known: dict[Hashable, _LookedAt] = remembered().setdefault(_LookedAt, {})
    return known


def _remember_looked_at(known_as: Hashable, placed: Placed) -> None:
    """Note what was found of evaluations that are known so.

    What a node or a model makes anew for every step, of its sigma, is another one the second time.
    """
    known = _looked_at()
    before = known.pop(known_as, None)
    times = before.times if before is not None and before.keys == placed.keys else 0
    known[known_as] = _LookedAt(placed.keys, times + 1)
    if len(known) > LOOKED_AT:
        del known[next(iter(known))]


def launcher_of(config: GroupConfig) -> Launcher:
    """What starts the ranks of such a group."""
    return RayLauncher() if config.where == "ray" else LocalLauncher()


class Engine:
    """Has a group of processes serve requests, one at a time. Thread-safe.

    ``processes``: that group, for what its caller wants to know beyond how it stands.
    """

    def __init__(self, config: GroupConfig, launcher: Launcher | None = None) -> None:
        """Raises TPRuntimeError: the system has no memory or no open files left for it."""
        self.config = config
        self._sender = TensorSender()
        exchange = self._sender.exchange
        try:
            self.processes = RankProcesses(config, launcher or launcher_of(config), exchange)
        except TPRuntimeError:
            exchange.close()
            raise
        self._evaluation_times = EvaluationTimes()
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()  # held by the caller whose request is under way
        # In which the results of the last request are handed over, if it was such a one, and all
        # ranks that share the exchange are through with what it brought when they are.
        self._stream: Hashable = None
        self._trusts_makers = True  # of ``Asked.known_as``

    def start(self, poll: Poll | None = None) -> None:
        """Start the ranks; see ``RankProcesses.start``."""
        self.processes.start(poll)

    def close(self) -> None:
        """End the group; see ``RankProcesses.close``."""
        self.processes.close()

    def is_up(self) -> bool:
        """Whether the group has started, and all its ranks live."""
        return self.processes.is_up()

    @property
    def state(self) -> State:
        return self.processes.state

    @property
    def error(self) -> TPRuntimeError | None:
        """What the group has failed of."""
        return self.processes.error

    @property
    def ranks(self) -> Sequence[Rank]:
        return self.processes.ranks

    def call(
        self,
        make: Callable[[int], Request],
        *,
        poll: Poll | None = None,
        on_progress: OnProgress | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> list[Any]:
        """Send one request to every rank; return each rank's ``Done.value``, in rank order.

        ``make`` gets the request's number. ``poll`` is called every 10 ms or so while waiting; if
        it raises, the request is abandoned and what it raised goes on to the caller. After
        ``on_sent`` was called, the ranks carry the request out even then.

        Raises:
            InputError: the ranks refused the request; the group is as before.
            RankError, GroupDiedError, CallTimeoutError, ProtocolError: the group has failed, and
                been ended.
            GroupLostError: it had failed before the request was sent, whatever of; a new group
                can carry the request out.
            GroupClosedError: it was closed.
        """
        with acquired(self._turn, poll):
            self._wait_for_calls(poll)
            call = self._send(make)
            if on_sent is not None:
                on_sent()
            call.wait(poll, on_progress)
        call.raise_error()
        return [answer.value for _, answer in sorted(call.answers.items())]  # type: ignore[union-attr]

    def evaluate(
        self,
        model: str,
        asked: Sequence[Asked],
        poll: Poll | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> Evaluated:
        """Make the evaluations that are ``asked``, at most one for each batch group.

        Each has a result for each tensor of its ``x``, of that one's dtype and device; one on a
        GPU is good in this thread's current stream. Tensors that the ranks hold from an earlier
        call are not sent again. ``on_sent``: as of ``call``. Within ``evaluated.ahead``, returns
        before the results are there, where that is possible; else they are settled.

        Raises:
            As ``call`` does, and ProtocolError if the inputs hold something that cannot be sent.
            InputError: a latent has values that are NaN or infinite; or a tensor that was known to
                be another's equal (``Asked.known_as``) is not.
            NotFiniteError: a result has.
        """
        kind = model, shapes_of([one.inputs for one in asked])
        device = self._stream_order_of(asked, kind)
        known_as = None
        if self._trusts_makers and all(one.known_as is not None for one in asked):
            known_as = self, kind, *(one.known_as for one in asked)
        made: list[Placed] = []

        def make(number: int) -> Request:
            if laid_out is not None and device is not None:
                placed = self._sender.place_in_stream_order(number, model, laid_out, device)
            else:
                placed = self._sender.place_evaluations(number, model, asked)
            if device is not None:
                self._await(number, placed.results, buffers, device)
                placed = placed._replace(results=buffers)
            # With its results, since the group may end between its answer and our reading it.
            made.append(placed)
            return placed.request

        with acquired(self._turn, poll):
            laid_out = None
            if device is not None and self._evaluation_times.is_short(kind):
                laid_out = self._laid_out(asked, known_as, device)
            if laid_out is None:
                settle_all(poll)
            self._wait_for_calls(poll, but=0 if laid_out is None else 1)
            # Not in ``make``: where memory is short, making room waits for the device's streams,
            # which must not wait for a request that is not sent, or for whoever has the exchange.
            buffers = [] if device is None else buffers_for(asked, device)
            try:
                call = self._send(make, kind)
            except BaseException:
                self._sender.roll_back()
                self._release()
                raise
            self._sender.sent()
            if on_sent is not None:
                on_sent()
            (placed,) = made
            check = functools.partial(self._check, call, kind, asked, placed.are_equal)
            evaluated = Evaluated(placed.results, call, check, self._release)
            if known_as is not None:
                _remember_looked_at(known_as, placed)
            if device is not None and call.sent:
                # A rank that computes nothing of it may still have to read what it is to hold.
                if not placed.brings or len(asked) == self.config.batch_groups:
                    self._stream = stream_wait.current(device)
                note_ahead(evaluated)
            else:
                evaluated.settle(poll)
                evaluated.results = self._copied(asked, placed.results)
        return evaluated

    def _await(
        self,
        number: int,
        places: Sequence[Sequence[torch.Tensor]],
        buffers: Sequence[Sequence[torch.Tensor]],
        device: torch.device,
    ) -> None:
        """Have the device's current stream bring the results of a request into their buffers."""
        exchange = self._sender.exchange
        for batch_group in range(len(places)):
            exchange.await_given(device, batch_group, number)
        for results, targets in zip(places, buffers, strict=True):
            for result, target in zip(results, targets, strict=True):
                exchange.copy_to(target, result)

    def _laid_out(
        self, asked: Sequence[Asked], known_as: Hashable, device: torch.device
    ) -> LaidOut | None:
        """How they are placed if the request need not wait for anything: the constant inputs are
        known by their makers, and all the rest is in the order of one stream.
        """
        if known_as is None or self._stream != stream_wait.current(device):
            return None
        looked_at = _looked_at().get(known_as)
        if looked_at is None or looked_at.times < LOOKS:
            return None
        return self._sender.laid_out(asked, looked_at.keys, device)

    def _copied(
        self, asked: Sequence[Asked], results: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        """The results on their latents' devices."""
        with self.processes.exchange_in_use:
            return [
                [
                    self._sender.exchange.copied_to(latent.device, result)
                    for latent, result in zip(tensors_in(one.inputs["x"]), of_one, strict=True)
                ]
                for one, of_one in zip(asked, results, strict=True)
            ]

    def _check(
        self,
        call: Call,
        kind: Hashable,
        asked: Sequence[Asked],
        are_equal: Callable[[], bool] | None,
    ) -> None:
        """Raises what is wrong with evaluations that the ranks have answered."""
        call.raise_error()
        if are_equal is not None and not are_equal():
            self._trusts_makers = False
            raise failures.changed_in_place()
        answers: Iterable[Any] = (of.value for of in call.answers.values())  # type: ignore[union-attr]
        of_latents, of_results = map(sum, zip(*answers, strict=True))
        if of_latents:
            raise failures.latent_not_finite(of_latents, asked)
        if of_results:
            raise failures.not_finite(of_results, asked)
        self._evaluation_times.record(kind, call.ended - call.began)

    def _release(self) -> None:
        """Have no stream wait for results: nobody is going to look at them.

        Whoever has the exchange may be waiting for such a stream.
        """
        self._sender.exchange.release()

    def _stream_order_of(self, asked: Sequence[Asked], kind: Hashable) -> torch.device | None:
        """The device in whose stream the results are handed over; None: not in stream order.

        Not those of the first evaluations of a kind, which compile and may not fit the memory: what
        is wrong with them is raised where they were asked for.
        """
        (device, *others) = {
            latent.device for one in asked for latent in tensors_in(one.inputs["x"])
        }
        possible = (
            may_be_ahead()
            and not others
            and device.type == "cuda"
            and self.config.device == "cuda"
            and self.config.where == "this machine"
            and self._evaluation_times.is_known(kind)
            and stream_wait.is_possible(device)
        )
        return device if possible else None

    def patch(
        self,
        model: str,
        weights: Mapping[str, PatchedWeight],
        poll: Poll | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Change the model's weights to those of the file but for ``weights``.

        ``weights``: name in the file → changes, whose factors are tensors or numbers. Tensors
        that the ranks hold, for this or another model, are not sent again.

        Raises:
            As ``call`` does.
        """
        for portion in self._sender.not_held(weights):
            self.call(functools.partial(self._sender.hold, factors=portion), poll=poll)
        patch = functools.partial(self._sender.patch, model=model, weights=weights)
        self.call(patch, poll=poll, on_sent=on_sent)

    def bytes_not_held(self, weights: Mapping[str, PatchedWeight]) -> int:
        """Bytes of the factors that ``patch`` would send."""
        return sum(factor.nbytes for part in self._sender.not_held(weights) for factor in part)

    def load_patch(
        self,
        model: str,
        spec: ModelPatchSpec,
        tensors: Iterable[tuple[str, torch.Tensor]],
        poll: Poll | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[int]:
        """Give the ranks a model patch; returns the bytes that it takes on each.

        ``tensors``: name and tensor, each taken when it is sent. A call that is abandoned leaves
        the ranks a part of them; the next one begins anew.

        Raises:
            As ``call`` does.
        """
        values = self.call(lambda call: LoadModelPatch(call, model, spec), poll=poll)
        total, done = sum(value["resident_bytes"] for value in values), 0
        portion: dict[str, torch.Tensor] = {}
        for name, tensor in tensors:
            portion[name] = tensor
            if sum(one.nbytes for one in portion.values()) >= HOLD_BYTES:
                done += self._fill(model, portion, poll)
                if on_progress is not None:
                    on_progress(min(done, total), total)
                portion = {}
        self._fill(model, portion, poll)
        return [value["resident_bytes"] for value in values]

    def _fill(self, model: str, tensors: Mapping[str, torch.Tensor], poll: Poll | None) -> int:
        """Send them; how many bytes they have."""
        self.call(functools.partial(self._sender.fill, model=model, tensors=tensors), poll=poll)
        return sum(tensor.nbytes for tensor in tensors.values())

    def unload(
        self, model: str, poll: Poll | None = None, on_sent: Callable[[], object] | None = None
    ) -> None:
        """Free the model's shards. ``on_sent``: as of ``call``, which it raises as."""
        self._leave_devices(functools.partial(self._sender.unload, model=model), poll, on_sent)

    def sleep(self, model: str, poll: Poll | None, on_sent: Callable[[], None]) -> None:
        """Move the model's shards to the host's memory. Raises as ``call``, as of which ``on_sent``
        is.
        """
        self._leave_devices(lambda call: Sleep(call, model), poll, on_sent)

    def _leave_devices(
        self,
        make: Callable[[int], Request],
        poll: Poll | None,
        on_sent: Callable[[], object] | None,
    ) -> None:
        """Send a request with which the ranks drop all conditioning, too."""

        def forget() -> None:
            self._sender.forget_held()
            if on_sent is not None:
                on_sent()

        self.call(make, poll=poll, on_sent=forget)

    def _wait_for_calls(self, poll: Poll | None, *, but: int = 0) -> None:
        """Until at most so many are under way. Abandoned ones may still be."""
        calls = self.processes.calls_under_way
        for call in calls[: len(calls) - but]:
            call.wait(poll)

    def _send(self, make: Callable[[int], Request], kind: Hashable = None) -> Call:
        number = next(self._numbers)
        self._stream = None
        with self.processes.exchange_in_use:
            self.processes.check_ready()
            request = make(number)
            written = self._sender.exchange.take_written()
        frame = encode(request)
        timeout_s = self._evaluation_times.timeout_s(kind, self.config.call_timeout_s)
        call = Call(number, self.config.num_ranks, timeout_s, type(request).__name__)
        self.processes.send(call, frame, written)
        return call
