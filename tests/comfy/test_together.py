"""Threads whose evaluations meet in one request."""

import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from support.pack import pack_module

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(60)]

Question = dict[str, Any]
MODEL = object()
named: contextvars.ContextVar[str] = contextvars.ContextVar("named")


@pytest.fixture(scope="module")
def meeting_class() -> Iterator[Any]:
    with pack_module("nodes.together") as module:
        yield module.Meeting


def asking(meeting_class: Any, name: str, times: int) -> Callable[[], list[float]]:
    """A task that wants so many evaluations, one after the other."""

    def task() -> list[float]:
        meeting = meeting_class.of_this_thread(MODEL)
        questions = ({"x": torch.tensor(float(i)), "name": name} for i in range(times))
        return [meeting.evaluate(question).item() for question in questions]

    return task


def test_whoever_still_asks_is_answered_together(meeting_class: Any) -> None:
    rounds: list[list[str]] = []

    def evaluate_all(questions: list[Question]) -> list[torch.Tensor]:
        assert threading.current_thread() is threading.main_thread()
        rounds.append(sorted(question["name"] for question in questions))
        return [question["x"] + ord(question["name"]) for question in questions]

    tasks = [asking(meeting_class, name, times) for name, times in (("a", 1), ("b", 3), ("c", 0))]
    results = meeting_class(MODEL).run(tasks, evaluate_all)
    assert rounds == [["a", "b"], ["b"], ["b"]]
    assert results == [[97.0], [98.0, 99.0, 100.0], []]


def test_outside_of_a_meeting_there_is_none(meeting_class: Any) -> None:
    meeting_class(MODEL).run([lambda: None], lambda _: [])
    assert meeting_class.of_this_thread(MODEL) is None


def test_another_model_is_not_asked_there(meeting_class: Any) -> None:
    found = meeting_class(MODEL).run([lambda: meeting_class.of_this_thread(object())], lambda _: [])
    assert found == [None]


class Cancelled(BaseException):
    """As ComfyUI's InterruptProcessingException is none of Exception's."""


def test_what_ends_the_request_ends_everything(meeting_class: Any) -> None:
    def evaluate_all(_: list[Question]) -> list[torch.Tensor]:
        raise Cancelled("by the person")

    before = threading.active_count()
    tasks = [asking(meeting_class, name, 2) for name in "abc"]
    with pytest.raises(Cancelled, match="by the person"):
        meeting_class(MODEL).run(tasks, evaluate_all)
    assert threading.active_count() == before


def test_a_task_that_fails_does_not_keep_the_others_waiting(meeting_class: Any) -> None:
    answered: list[int] = []

    def evaluate_all(questions: list[Question]) -> list[torch.Tensor]:
        answered.append(len(questions))
        return [question["x"] for question in questions]

    def failing() -> list[float]:
        raise ValueError("no condition")

    with pytest.raises(ValueError, match="no condition"):
        meeting_class(MODEL).run([asking(meeting_class, "a", 2), failing], evaluate_all)
    assert answered == [1, 1]


def test_threads_are_as_the_one_that_starts_them(meeting_class: Any) -> None:
    """ComfyUI samples in inference mode, and knows by the context which node runs."""
    named.set("sampler")

    def task() -> tuple[bool, str]:
        return torch.is_inference_mode_enabled(), named.get()

    with torch.inference_mode():
        assert meeting_class(MODEL).run([task], lambda _: []) == [(True, "sampler")]
    assert meeting_class(MODEL).run([task], lambda _: []) == [(False, "sampler")]
