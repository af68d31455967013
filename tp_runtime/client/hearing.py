"""What the ranks of a group say: taken as it arrives, and weighed when a rank has failed."""

from collections.abc import Sequence
from typing import Any

from ..config import GroupConfig
from ..errors import GroupStartError, ProtocolError, TPRuntimeError
from ..wire.exchange import Exchange
from ..wire.protocol import Failed, Piece, Ready, Reply, decode_reply
from ..wire.transport import wait
from .call import START, unasked
from .evidence import Evidence
from .group_state import GroupState
from .launch.launcher import Rank

# After one rank's error, wait so long for the end of another rank, which may have caused it.
CAUSE_S = 0.2
OTHER_HOSTS_CAUSE_S = 0.5  # where that rank is on another host


class Hearing:
    """Takes the ranks' messages, in the owner's thread.

    ``ready``: what the ranks said when they were. ``evidence``: what speaks against them.
    """

    def __init__(self, config: GroupConfig, exchange: Exchange, state: GroupState) -> None:
        self.ranks: Sequence[Rank] = ()
        self.ready: list[Ready] = []
        self.evidence = Evidence(config)
        self._config = config
        self._exchange = exchange
        self._state = state

    def hear(self) -> None:
        """Take what has arrived from the ranks; note what is wrong with it."""
        if self.evidence.fault is not None:
            return
        for rank in self.ranks:
            try:
                for frame in rank.channel.receive():
                    self._take(rank, decode_reply(frame))
            except TPRuntimeError as error:
                self.evidence.note_fault(rank, error)
                return

    def failure(self, happened: Sequence[Any]) -> TPRuntimeError | None:
        """Take what the ranks have sent; returns what ends the group, if something does.

        ``happened``: what ``RankEvents.wait`` returned.
        """
        self.hear()
        evidence = self.evidence
        if evidence.last_words and evidence.fault is None and not self._gone(happened):
            # The cause may be seen after what it caused: on a busy machine this thread has
            # looked at one rank long before another.
            quiet = [rank for rank in self.ranks if rank.index not in evidence.last_words]
            far = [rank.channel for rank in quiet if rank.mirrored]
            timeout_s = OTHER_HOSTS_CAUSE_S if far else CAUSE_S
            happened = wait([*(rank.death_fd for rank in quiet), *far], timeout_s)
            self.hear()
        call = self._state.call
        return evidence.verdict(self.ranks, self._gone(happened), call.what if call else None)

    def _gone(self, happened: Sequence[Any]) -> list[Rank]:
        """The ranks that have ended without a word."""
        return [
            rank
            for rank in self.ranks
            if rank.index not in self.evidence.last_words
            and (rank.channel.ended or rank.death_fd in happened)
        ]

    def _take(self, rank: Rank, reply: Reply) -> None:
        """Note what a rank says, and finish the call if that completes it.

        Raises:
            ProtocolError: the answer fits no request, or not the other ranks' answers.
            GroupStartError: the ranks are ready, but not as one group.
        """
        if isinstance(reply, Failed) and not reply.recoverable:
            self.evidence.last_words[rank.index] = reply
            return
        # Of what is under way, a rank answers one after the other.
        calls = self._state.calls
        call = next((one for one in calls if rank.index not in one.answers), None)
        if isinstance(reply, Piece):
            if call is None or not rank.mirrored:
                raise ProtocolError(f"Rank {rank.index} sent bytes that nothing had asked for.")
            self._exchange.put(reply.offset, reply.data)
            return
        if call is None:
            raise unasked(rank.index)
        call.take(rank.index, reply)
        if not call.complete():
            return
        if call.number == START:
            self.ready = [answer for _, answer in sorted(call.answers.items())]  # type: ignore[misc]
            self._check_sizes()
        self._state.end_call()
        call.finish()

    def _check_sizes(self) -> None:
        seen = [ready.tp_world_size for ready in self.ready]
        if seen != [self._config.tp_size] * self._config.num_ranks:
            raise GroupStartError(
                f"{self._config.num_ranks} ranks of tensor-parallel size {self._config.tp_size} "
                f"were asked for, but they see the sizes {seen}. This is a fault of the "
                f"installation of vLLM in the runtime's Python {self._config.python}. Make that "
                "Python anew (README, Install)."
            )
