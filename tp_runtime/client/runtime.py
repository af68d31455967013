"""The groups and models of this process: what the nodes talk to.

A group is started when a model on it is first needed, kept between prompts, and replaced by a
new one when it has failed. It ends with this process or when it is released.
"""

import atexit

from ..config import GroupConfig, ModelSpec, home
from ..errors import InputError
from ..layouts.link_records import LinkRecords
from ..layouts.step_history import StepRecords
from .group import Group
from .group_report import GroupReport
from .poll import Poll
from .remote_model import RemoteModel


class Runtime:
    """All groups of this process, by configuration."""

    def __init__(self) -> None:
        self.records = StepRecords(home() / "step_records.json")
        self.links = LinkRecords.of_home()
        self._groups: dict[GroupConfig, Group] = {}

    def model(self, spec: ModelSpec, config: GroupConfig) -> RemoteModel:
        """A handle to a model on a group; starts nothing.

        Raises:
            CheckpointError: the file cannot be used.
            SizeError: the model cannot be split over that many ranks.
        """
        group = self._groups.setdefault(config, Group(config, self._neighbours, self.links))
        return RemoteModel(spec, group, self.records)

    def groups(self) -> list[GroupReport]:
        """What is known of every group that was started and not released. Never waits.

        Without those that have failed and whose models nobody holds any more: they run elsewhere
        now, or will never run again.
        """
        return [group.report(ask_ranks=False) for group in self._shown()]

    def reports(self, *, digests: bool = False, poll: Poll | None = None) -> list[GroupReport]:
        """The same with what the ranks say; waits for the requests that are under way.

        ``digests``: with a hash of the weights of every model on every rank, which takes long.
        """
        return [group.report(digests=digests, poll=poll) for group in self._shown()]

    def sleep(self, group_id: str) -> None:
        """Free the devices of a group, which keeps its models in the host's memory."""
        self._group(group_id).sleep_all()

    def wake(self, group_id: str) -> None:
        """Have the model that a group used last on its devices again."""
        self._group(group_id).wake()

    def restart(self, group_id: str) -> None:
        """End a group and start it anew. Models are loaded when they are used next."""
        group = self._group(group_id)
        group.close()
        group.start()

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

    def _shown(self) -> list[Group]:
        return [group for group in self._started() if group.is_used() or not group.has_failed()]

    def _started(self) -> list[Group]:
        return [group for group in list(self._groups.values()) if group.engine]

    def _group(self, group_id: str) -> Group:
        """Raises InputError for an id that no group has."""
        for group in list(self._groups.values()):
            if group.id == group_id:
                return group
        raise InputError(
            f"There is no group {group_id!r}: it has been released, or has failed. The next prompt "
            "starts one."
        )


_runtime: Runtime | None = None


def get_runtime() -> Runtime:
    """This process's runtime; its groups end with the process."""
    global _runtime
    if _runtime is None:
        _runtime = Runtime()
        atexit.register(_runtime.release)
        atexit.register(_runtime.records.save)
    return _runtime
