"""The groups and models of this process: what the nodes talk to. Part of the engine's half.

A group is started when a model on it is first needed, kept between prompts, and replaced by a
new one when it has failed. It ends with this process or when it is released.
"""

import atexit
import contextlib
import hashlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from .checkpoint import CheckpointInfo, inspect_checkpoint
from .config import GroupConfig, ModelSpec
from .engine import POLL_S, Engine, OnProgress, Poll, State
from .errors import CheckpointError, GroupClosedError, TPRuntimeError
from .protocol import Load, Report, Unload
from .tensors import dtype_of


@dataclass(frozen=True)
class GroupReport:
    """What a group is and holds. ``ranks``: one mapping each, empty unless it is ready.

    Of each rank: ``rank``, ``tp_world_size`` (as vLLM reports it there), ``device``, ``pid``,
    ``versions``, ``memory`` (bytes), ``models`` (bytes resident and read), ``last_step_ms``.
    """

    state: str
    tp_size: int
    device: str
    python: str
    error: str | None
    ranks: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


class _Group:
    """A group's configuration, its present engine and what that holds."""

    def __init__(self, config: GroupConfig) -> None:
        self.config = config
        self.engine: Engine | None = None
        # Of the present engine: model name → bytes resident on rank 0; 0 while that is not known
        # (being loaded, or the wait for it was given up).
        self.loaded: dict[str, int] = {}
        self._users: weakref.WeakSet[RemoteModel] = weakref.WeakSet()
        self._users_lock = threading.Lock()
        self._starting = threading.Lock()
        self._loading = threading.Lock()

    def alive(self) -> Engine | None:
        """The engine, if its group is up."""
        engine = self.engine
        return engine if engine and engine.state in (State.READY, State.BUSY) else None

    def add_user(self, model: "RemoteModel") -> None:
        """Keep the model's shards, once loaded, for as long as ``model`` is there."""
        with self._users_lock:
            self._users.add(model)
        weakref.finalize(model, self._on_user_gone).atexit = False

    def _on_user_gone(self) -> None:
        # In a thread: the garbage collector may come while this one waits for the group.
        if self.alive():
            threading.Thread(target=self._free_unused, daemon=True).start()

    def _free_unused(self) -> None:
        with self.loading(None), contextlib.suppress(TPRuntimeError):
            engine = self.alive()
            if engine is not None:
                self.unload_unused(engine, None)

    def unload_unused(self, engine: Engine, poll: Poll | None) -> None:
        """Free the shards of models that nobody holds. To be called while ``loading``."""
        with self._users_lock:
            wanted = {model.name for model in self._users}
        for name in set(self.loaded) - wanted:
            self.unload(engine, name, poll)

    def unload(self, engine: Engine, name: str, poll: Poll | None) -> None:
        """Free a model's shards. To be called while ``loading``."""
        loaded = self.loaded
        engine.call(lambda call: Unload(call, name), poll=poll)
        loaded.pop(name, None)

    def loading(self, poll: Poll | None) -> contextlib.AbstractContextManager[None]:
        """Be the only one that changes what the group holds."""
        return _acquired(self._loading, poll)

    def started(self, poll: Poll | None) -> tuple[Engine, dict[str, int]]:
        """The engine of a running group, which is started if there is none, and its models."""
        with _acquired(self._starting, poll):
            engine = self.alive()
            if engine is None:
                self.close()
                engine = Engine(self.config)
                self.engine = engine
                engine.start(poll)
            return engine, self.loaded

    def close(self) -> bool:
        """End the group; False if there was none."""
        engine, self.engine = self.engine, None
        self.loaded = {}
        if engine is None:
            return False
        had_processes = engine.state not in (State.FAILED, State.CLOSED)
        engine.close()
        return had_processes

    def report(self) -> GroupReport:
        engine = self.engine
        ranks: list[dict[str, Any]] = []
        error = str(engine.error) if engine and engine.error else None
        if engine is not None and self.alive():
            try:
                values = engine.call(Report)
            except TPRuntimeError as failure:
                error = str(failure)
            else:
                ranks = [
                    {
                        "rank": ready.rank,
                        "tp_world_size": ready.tp_world_size,
                        "pid": rank.pid,
                        "versions": ready.versions,
                        **value,
                    }
                    for ready, rank, value in zip(engine.ready, engine.ranks, values, strict=True)
                ]
        return GroupReport(
            state=engine.state.value if engine else State.CLOSED.value,
            tp_size=self.config.tp_size,
            device=self.config.device,
            python=self.config.python,
            error=error,
            ranks=ranks,
        )


class RemoteModel:
    """A model on a group, as the nodes hold it. Cheap: nothing is started before it is needed.

    Equal specs on one group share their shards, which are freed when nobody holds such a model
    any more.
    """

    def __init__(self, spec: ModelSpec, group: _Group) -> None:
        self.spec = spec
        self.info: CheckpointInfo = inspect_checkpoint(spec.path)
        self.info.check_tp_size(group.config.tp_size)
        digest = hashlib.blake2s(msgspec.json.encode(spec), digest_size=6).hexdigest()
        self.name = f"{Path(spec.path).name}@{digest}"
        self._group = group
        group.add_user(self)

    @property
    def group_config(self) -> GroupConfig:
        return self._group.config

    def ensure_loaded(
        self, poll: Poll | None = None, on_progress: OnProgress | None = None
    ) -> None:
        """Have the group running and the shards loaded. Returns at once if they are.

        ``poll`` is called every 10 ms or so while waiting; what it raises ends the wait (the
        ranks go on loading for themselves). ``on_progress(done, total)`` gets bytes, summed over
        the ranks.

        Raises:
            GroupStartError, CheckpointError, and what ``Engine.call`` raises.
        """
        engine, loaded = self._group.started(poll)
        with self._group.loading(poll):
            if loaded.get(self.name):
                return
            self._group.unload_unused(engine, poll)
            loaded[self.name] = 0  # the ranks have it in the end even if poll gives up the wait
            try:
                values = engine.call(
                    lambda call: Load(call, self.name, self.spec),
                    poll=poll,
                    on_progress=on_progress,
                )
            except CheckpointError:
                del loaded[self.name]
                raise
            loaded[self.name] = values[0]["resident_bytes"]

    def denoise(self, inputs: Mapping[str, Any], poll: Poll | None = None) -> torch.Tensor:
        """Evaluate the model once; see ``Engine.denoise``. Call ``ensure_loaded`` before.

        The result has the shape of ``inputs["x"]``, but for the channels of a model that takes
        more of them (masks, control images) than it predicts.
        """
        engine = self._group.alive()
        if engine is None or not self._group.loaded.get(self.name):
            raise GroupClosedError(
                "The process group was ended since the model was loaded. Queue the prompt again."
            )
        batch, channels, *size = inputs["x"].shape
        shape = (batch, self.info.config.get("out_channels", channels), *size)
        return engine.denoise(self.name, inputs, shape, poll)

    def loaded_bytes(self) -> int:
        """Bytes that the shards take on rank 0's device; 0 if not loaded."""
        return self._group.loaded.get(self.name, 0) if self._group.alive() else 0

    def planned_bytes(self) -> int:
        """Bytes that the shards will take there, to within a few percent."""
        plain = dtype_of(self.spec.weight_dtype).itemsize
        total = sum(
            tensor.num_elements * (1 if tensor.dtype.startswith("F8") else plain)
            for tensor in self.info.tensors.values()
        )
        return total // self.group_config.tp_size

    def unload(self) -> None:
        """Free the shards; the group stays. Nothing happens if they are not loaded.

        Shards that the ranks still load, since a cancelled prompt gave up the wait, are left to
        the next ``ensure_loaded``: ComfyUI unloads on cancel, which must not wait for them.
        """
        # Where the group ends meanwhile, what it held is free as well.
        with self._group.loading(None), contextlib.suppress(TPRuntimeError):
            engine = self._group.alive()
            if engine is not None and self._group.loaded.get(self.name):
                self._group.unload(engine, self.name, None)


@contextlib.contextmanager
def _acquired(lock: threading.Lock, poll: Poll | None) -> Iterator[None]:
    """Hold the lock; ``poll`` is called while waiting for it."""
    while not lock.acquire(timeout=POLL_S):
        if poll is not None:
            poll()
    try:
        yield
    finally:
        lock.release()


class Runtime:
    """All groups of this process, by configuration."""

    def __init__(self) -> None:
        self._groups: dict[GroupConfig, _Group] = {}

    def model(self, spec: ModelSpec, config: GroupConfig) -> RemoteModel:
        """A handle to a model on a group; starts nothing.

        Raises:
            CheckpointError: the file cannot be used.
            SizeError: the model cannot be split over that many ranks.
        """
        return RemoteModel(spec, self._groups.setdefault(config, _Group(config)))

    def reports(self) -> list[GroupReport]:
        """A report of every group that has been started and not been released."""
        return [group.report() for group in list(self._groups.values()) if group.engine]

    def release(self) -> int:
        """End every group and free what it holds; returns how many there were."""
        return sum(group.close() for group in list(self._groups.values()))


_runtime: Runtime | None = None


def get_runtime() -> Runtime:
    """This process's runtime; its groups end with the process."""
    global _runtime
    if _runtime is None:
        _runtime = Runtime()
        atexit.register(_runtime.release)
    return _runtime
