"""What is kept ahead of the ranks stays within its bounds; what is left for later has one stream.

`tests/process/test_ahead.py` and `tests/gpu/test_ahead.py` are of the rest.
"""

import contextlib
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_runtime.client import ahead, meanwhile
from tp_runtime.client.engine import _remember_looked_at
from tp_runtime.client.evaluated import Evaluated, do_meanwhile, note_ahead


class Known:
    """What evaluations are known as."""


def test_known_evaluations_are_forgotten_that_come_no_more() -> None:
    """A node, or ComfyUI's context windows, may make the conditions of every step anew."""
    placed: Any = SimpleNamespace(keys=[1])
    of_every_step, others = Known(), []
    with ahead():
        for _ in range(1000):
            _remember_looked_at(of_every_step, placed)
            known = Known()
            others.append(weakref.ref(known))
            _remember_looked_at(known, placed)
        kept = [ref for ref in others if ref() is not None]
        assert 0 < len(kept) <= 100
        reference = weakref.ref(of_every_step)
        del of_every_step, known
        assert reference() is not None


def test_no_more_streams_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would give out 32 in turn, each of which comes to memory of its own."""
    made: list[torch.device] = []
    used: list[Any] = []

    class Stream:
        """Stands for a stream of a GPU."""

        def __init__(self, device: torch.device) -> None:
            made.append(device)

    def entered(stream: Stream) -> contextlib.nullcontext[None]:
        used.append(stream)
        return contextlib.nullcontext()

    waited: list[int] = []
    event = SimpleNamespace(synchronize=lambda: waited.append(len(used)))
    current = SimpleNamespace(record_event=lambda recorded: recorded)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    devices = [torch.device("cuda", index) for index in (6, 7)]
    tensors: Any = [SimpleNamespace(device=one, record_stream=lambda _: None) for one in devices]
    call: Any = SimpleNamespace(finished=threading.Event(), wait=lambda _: None)
    with ahead():
        for _ in range(3):
            note_ahead(Evaluated([], call, lambda: None, lambda: None))
            meanwhile(lambda: None, *tensors)
            do_meanwhile()
    assert made == devices
    assert len(used) == 6
    assert len({*used}) == 2
    assert waited == [*range(6)], "the host waits for each before its stream is used"
