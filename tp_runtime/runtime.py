"""The groups and models of this process: what the nodes talk to. Part of the engine's half.

A group is started when a model on it is first needed, kept between prompts, and replaced by a
new one when it has failed. It ends with this process or when it is released.
"""

import atexit
import hashlib
import itertools
import threading
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from .batch import divide_all
from .calls import OnProgress
from .checkpoint import CheckpointInfo, inspect_checkpoint
from .config import GroupConfig, ModelSpec, device_name, home
from .errors import InputError
from .group import Group, GroupReport
from .launcher import Poll
from .protocol import PatchedWeight
from .step_records import StepRecords, Workload
from .tensors import dtype_of


class RemoteModel:
    """A model on a group, as the nodes hold it. Cheap: nothing is started before it is needed.

    Equal specs on one group share their shards, which are freed when nobody holds such a model
    any more.
    """

    def __init__(self, spec: ModelSpec, group: Group, records: StepRecords) -> None:
        self.spec = spec
        self.num_evaluations = 0
        self.info: CheckpointInfo = inspect_checkpoint(spec.path)
        self.info.check_tp_size(group.config.tp_size)
        digest = hashlib.blake2s(msgspec.json.encode(spec), digest_size=6).hexdigest()
        self.name = f"{Path(spec.path).name}@{digest}"
        self.version: Hashable = None
        self.patches: Mapping[str, PatchedWeight] = {}
        self.used_at_start = 0  # how many groups had been started when it was loaded on purpose
        self._group = group
        self._records = records
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
        """
        self.version = version
        self.patches = patches

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

    def denoise(self, inputs: Mapping[str, Any], poll: Poll | None = None) -> torch.Tensor:
        """Evaluate the model once; see ``denoise_all``."""
        return self.denoise_all([inputs], poll)[0]

    def denoise_all(
        self, wanted: Sequence[Mapping[str, Any]], poll: Poll | None = None
    ) -> list[torch.Tensor]:
        """Evaluate the model once for each of ``wanted``. Call ``ensure_loaded`` before.

        The batch groups work on different evaluations, or on different items of a batch. Inputs
        and results are as in ``Engine.denoise``. A result has the shape of ``inputs["x"]``, but
        for the channels of a model that takes more of them (masks, control images) than it
        predicts.
        """
        self.num_evaluations += len(wanted)
        batch_groups = self.group_config.batch_groups
        divided = divide_all(wanted, batch_groups)
        parts = [(part, self._result_shape(part)) for parts in divided for part in parts]
        results: list[torch.Tensor] = []
        for start in range(0, len(parts), batch_groups):
            results += self._group.denoise(self, parts[start : start + batch_groups], poll)
        remaining = iter(results)
        together = [list(itertools.islice(remaining, len(parts))) for parts in divided]
        return [results[0] if len(results) == 1 else torch.cat(results) for results in together]

    def record_step(self, workload: Workload, ms: float) -> None:
        """Remember, beyond this process, how long a step of a sampler took."""
        config = self.group_config
        if config.where == "ray":  # what is known is known of this machine
            return
        device = device_name(config.devices[0] if config.devices else None)
        self._records.add(self.spec.path, device, workload, config.layout, ms)

    def _result_shape(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        batch, channels, *size = inputs["x"].shape
        return (batch, self.info.config.get("out_channels", channels), *size)

    def loaded_bytes(self) -> list[int]:
        """Bytes that the weights take on each rank's device now."""
        return self._group.bytes_on_devices(self.name)

    def planned_bytes(self) -> int:
        """Bytes that the weights will take on each, to within a few percent."""
        itemsize = dtype_of(self.spec.weight_dtype).itemsize
        return self.info.weight_bytes(itemsize) // self.group_config.tp_size

    def sleep(self, poll: Poll | None = None, *, wait: bool = True) -> None:
        """Move the weights to the host's memory, or free them if that has no room.

        ``wait`` False: in the background, as soon as the ranks have done what they are at.
        """
        if wait:
            self._group.sleep(self.name, poll)
        else:
            threading.Thread(target=self._group.sleep, args=(self.name,), daemon=True).start()


class Runtime:
    """All groups of this process, by configuration."""

    def __init__(self) -> None:
        self.records = StepRecords(home() / "step_records.json")
        self._groups: dict[GroupConfig, Group] = {}

    def model(self, spec: ModelSpec, config: GroupConfig) -> RemoteModel:
        """A handle to a model on a group; starts nothing.

        Raises:
            CheckpointError: the file cannot be used.
            SizeError: the model cannot be split over that many ranks.
        """
        group = self._groups.setdefault(config, Group(config, self._neighbours))
        return RemoteModel(spec, group, self.records)

    def groups(self) -> list[GroupReport]:
        """What is known of every group that was started and not released. Never waits."""
        return [group.report(ask_ranks=False) for group in self._started()]

    def reports(self, *, digests: bool = False, poll: Poll | None = None) -> list[GroupReport]:
        """The same with what the ranks say; waits for the requests that are under way.

        ``digests``: with a hash of the weights of every model on every rank, which takes long.
        """
        return [group.report(digests=digests, poll=poll) for group in self._started()]

    def sleep(self, group_id: str, poll: Poll | None = None) -> None:
        """Free the devices of a group, which keeps its models in the host's memory."""
        self._group(group_id).sleep_all(poll)

    def wake(self, group_id: str, poll: Poll | None = None) -> None:
        """Have the model that a group used last on its devices again."""
        self._group(group_id).wake(poll)

    def restart(self, group_id: str, poll: Poll | None = None) -> None:
        """End a group and start it anew. Models are loaded when they are used next."""
        group = self._group(group_id)
        group.close()
        group.start(poll)

    def release(self, group_id: str | None = None) -> int:
        """End a group, or every group, and free what it holds; returns how many there were."""
        groups = list(self._groups.values()) if group_id is None else [self._group(group_id)]
        return sum(group.close() for group in groups)

    def _neighbours(self, config: GroupConfig) -> list[Group]:
        """The groups that share devices with the one of this configuration."""
        return [
            group
            for group in self._started()
            if group.config != config and config.meets(group.config)
        ]

    def _started(self) -> list[Group]:
        return [group for group in list(self._groups.values()) if group.engine]

    def _group(self, group_id: str) -> Group:
        """Raises InputError for an id that no group has."""
        for group in list(self._groups.values()):
            if group.id == group_id:
                return group
        raise InputError(f"There is no group {group_id!r}.")


_runtime: Runtime | None = None


def get_runtime() -> Runtime:
    """This process's runtime; its groups end with the process."""
    global _runtime
    if _runtime is None:
        _runtime = Runtime()
        atexit.register(_runtime.release)
        atexit.register(_runtime.records.save)
    return _runtime
