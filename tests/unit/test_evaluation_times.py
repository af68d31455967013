"""Whether steps are known or short, and how long a rank may be silent: by what others took."""

import torch

from tp_runtime.client.evaluation_times import (
    FACTOR,
    FIRST_EVALUATIONS,
    FLOOR_S,
    SHORT_S,
    EvaluationTimes,
    shapes_of,
)


def after(*seconds: float) -> EvaluationTimes:
    times = EvaluationTimes()
    for took in seconds:
        times.record("kind", took)
    return times


def test_steps_that_compile_have_the_whole_allowance() -> None:
    assert after().timeout_s("kind", 600) == 600
    assert after(*[100.0] * FIRST_EVALUATIONS).timeout_s("kind", 600) == 600


def test_the_slowest_step_counts() -> None:
    times = after(*[100.0] * FIRST_EVALUATIONS, 5.0, 6.0, 4.0)
    assert times.timeout_s("kind", 600) == FACTOR * 6
    assert times.timeout_s("another kind", 600) == 600


def test_there_is_a_floor_and_a_limit() -> None:
    first = [1.0] * FIRST_EVALUATIONS
    assert after(*first, 0.001).timeout_s("kind", 600) == FLOOR_S
    assert after(*first, 0.001).timeout_s("kind", 10) == 10
    assert after(*first, 500.0).timeout_s("kind", 600) == 600


def test_the_first_steps_say_nothing_of_the_next() -> None:
    assert not after().is_known("kind")
    assert not after(*[0.01] * FIRST_EVALUATIONS).is_known("kind")
    assert after(*[0.01] * FIRST_EVALUATIONS, 5.0).is_known("kind")


def test_whether_the_next_step_is_short() -> None:
    assert not after().is_short("kind")
    assert not after(*[0.01] * FIRST_EVALUATIONS).is_short("kind")
    assert after(*[0.01] * FIRST_EVALUATIONS, 5.0, SHORT_S / 2).is_short("kind")
    assert not after(*[0.01] * FIRST_EVALUATIONS, SHORT_S / 2, SHORT_S).is_short("kind")


def test_steps_are_alike_if_their_shapes_are() -> None:
    inputs = {"x": torch.zeros(2, 3), "options": {"refs": [torch.zeros(4), 1.5]}}
    same = {"x": torch.ones(2, 3), "options": {"refs": [torch.ones(4), 2.5]}}
    other = {"x": torch.zeros(2, 3), "options": {"refs": [torch.zeros(5), 1.5]}}
    assert shapes_of(inputs) == shapes_of(same) != shapes_of(other)
    assert hash(shapes_of(inputs)) == hash(shapes_of(same))
