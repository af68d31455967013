"""Evaluations that several threads ask for, computed as one request.

ComfyUI evaluates conditions that cannot share a batch (texts of different lengths) one after the
other. Batch groups could work on them at the same time, if they came together.
"""

import contextvars
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

EvaluateAll = Callable[[list[Any]], list[Any]]  # what was asked for → results of each
T = TypeVar("T")

_meeting: contextvars.ContextVar["Meeting | None"] = contextvars.ContextVar("meeting", default=None)


class Meeting:
    """Where threads leave what they want evaluated by one model, and wait for it."""

    def __init__(self, model: object) -> None:
        self._model = model
        self._events: queue.SimpleQueue[Future[Any] | _Question] = queue.SimpleQueue()

    @staticmethod
    def of_this_thread(model: object) -> "Meeting | None":
        """The one about that model that this thread takes part in.

        A node's function around a model may evaluate another one, which is not to be asked there.
        """
        meeting = _meeting.get()
        return meeting if meeting is not None and meeting._model is model else None

    def evaluate(self, asked: Any) -> Any:
        """In a thread of ``run``: the result, once every thread has asked for one or ended.

        Raises:
            What the ``evaluate_all`` of ``run`` raises.
        """
        answer: Future[Any] = Future()
        self._events.put((asked, answer))
        return answer.result()  # `_answer` always gives one

    def run(self, tasks: Sequence[Callable[[], T]], evaluate_all: EvaluateAll) -> list[T]:
        """Do every task in a thread of its own; ``evaluate_all`` is called in this thread.

        Raises:
            What the first of the tasks raises that fails, after all have ended.
        """
        inference = torch.is_inference_mode_enabled()  # which each thread has for itself
        with ThreadPoolExecutor(len(tasks)) as pool:
            results = [
                pool.submit(contextvars.copy_context().run, self._do, task, inference)
                for task in tasks
            ]
            for result in results:
                result.add_done_callback(self._events.put)
            self._serve(len(tasks), evaluate_all)
        return [result.result() for result in results]

    def _do(self, task: Callable[[], T], inference: bool) -> T:
        _meeting.set(self)
        with torch.inference_mode(inference):
            return task()

    def _serve(self, num_active: int, evaluate_all: EvaluateAll) -> None:
        questions: list[_Question] = []
        while num_active:
            event = self._events.get()
            if isinstance(event, Future):
                num_active -= 1
            else:
                questions.append(event)
            if questions and len(questions) == num_active:
                _answer(questions, evaluate_all)
                questions = []


_Question = tuple[Any, "Future[Any]"]


def _answer(questions: list[_Question], evaluate_all: EvaluateAll) -> None:
    try:
        results = evaluate_all([asked for asked, _ in questions])
    except BaseException as error:  # noqa: BLE001 - ComfyUI's cancel, too; the threads raise it
        for _, answer in questions:
            answer.set_exception(error)
    else:
        for (_, answer), result in zip(questions, results, strict=True):
            answer.set_result(result)
