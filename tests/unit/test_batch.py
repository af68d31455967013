"""A forward batch divided over batch groups."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_runtime.client.batch_split import divide, divide_all


def inputs_of(batch: int, **more: Any) -> dict[str, Any]:
    return {
        "x": torch.arange(batch * 6.0).view(batch, 2, 3),
        "timesteps": torch.arange(float(batch)),
        "context": torch.arange(batch * 4.0).view(batch, 4),
        "num_tokens": 7,
        "transformer_options": {},
        **more,
    }


@given(batch=st.integers(1, 9), num_parts=st.integers(1, 9))
def test_every_item_is_in_one_part_in_order(batch: int, num_parts: int) -> None:
    inputs = inputs_of(batch)
    parts = divide(inputs, num_parts)
    assert len(parts) == min(batch, num_parts)
    for name in ("x", "timesteps", "context"):
        assert torch.equal(torch.cat([part[name] for part in parts]), inputs[name])
        sizes = [len(part[name]) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert all(part["num_tokens"] == 7 for part in parts)


def test_what_many_blocks_are_given_is_one_tensor_in_every_part() -> None:
    one, other = torch.ones(2, 3), torch.zeros(2, 3)
    for part in divide(inputs_of(2, control={"input": [one, other, one]}), 2):
        first, second, third = part["control"]["input"]
        assert first is third
        assert first is not second


def test_what_serves_every_item_goes_to_every_part() -> None:
    picture, number = torch.ones(1, 5), torch.tensor(3.0)
    residuals = {"output": [torch.arange(4.0).view(2, 2), None]}
    inputs = inputs_of(2, ref_latents=[picture], shift=number, control=residuals)
    first, second = divide(inputs, 2)
    for part in (first, second):
        assert part["ref_latents"][0] is picture
        assert part["shift"] is number
    assert first["control"]["output"][0].tolist() == [[0.0, 1.0]]
    assert second["control"]["output"][0].tolist() == [[2.0, 3.0]]


def test_latents_in_a_list_are_divided_alike() -> None:
    inputs = inputs_of(3)
    both = [inputs["x"], torch.arange(3.0)[:, None]]
    first, second = divide(inputs | {"x": both}, 2)
    assert [one.tolist() for one in first["x"]] == [both[0][:2].tolist(), [[0.0], [1.0]]]
    assert [one.tolist() for one in second["x"]] == [both[0][2:].tolist(), [[2.0]]]


def test_a_batch_with_other_tensors_stays_whole() -> None:
    inputs = inputs_of(2, table=torch.ones(3))
    assert divide(inputs, 2) == [inputs]


@pytest.mark.parametrize(
    ("batches", "groups", "expected"),
    [
        ((4,), 2, [[2, 2]]),
        ((3,), 2, [[2, 1]]),
        ((1,), 4, [[1]]),
        ((1, 1), 2, [[1], [1]]),
        ((2, 2), 4, [[1, 1], [1, 1]]),
        ((1, 1, 1), 2, [[1], [1], [1]]),
    ],
    ids=str,
)
def test_several_evaluations_keep_the_groups_busy(
    batches: tuple[int, ...], groups: int, expected: list[list[int]]
) -> None:
    divided = divide_all([inputs_of(batch) for batch in batches], groups)
    assert [[len(part["x"]) for part in parts] for parts in divided] == expected
