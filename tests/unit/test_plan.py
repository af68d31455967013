"""Plans: every linear exactly once, every rank its part, and only sizes that can work."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tp_runtime.errors import SizeError
from tp_runtime.sharding.plan import (
    QKV,
    Column,
    MergedColumn,
    Plan,
    PlanError,
    Replicated,
    Row,
    Split,
    grouped_heads,
)

tp_sizes = st.integers(1, 8)
units = st.integers(1, 64)


@given(st.integers(1, 200), units, tp_sizes)
def test_ranks_share_an_axis_without_gap_or_overlap(count: int, unit: int, tp_size: int) -> None:
    split = Split(count, unit)
    ranges = [split.range(rank, tp_size) for rank in range(tp_size)]
    held = [feature for start, stop in ranges for feature in range(start, stop)]
    assert held == list(range(split.full))
    for start, stop in ranges:
        assert 0 <= stop - start <= split.local(tp_size)
        assert start % unit == stop % unit == 0
    # Padding is at the end: all ranks hold the same length, and no rank could hold less.
    assert split.local(tp_size) * tp_size - split.full < tp_size * unit


@given(st.integers(1, 8), st.integers(1, 12), units, tp_sizes)
def test_query_heads_stay_with_their_group(
    groups: int, per_group: int, unit: int, tp_size: int
) -> None:
    assume(max(tp_size, groups) % min(tp_size, groups) == 0)
    query = Split(groups * per_group, unit, groups=groups)
    key = Split(groups, unit, shared=True)
    held: list[int] = []
    for rank in range(tp_size):
        start, stop = query.range(rank, tp_size)
        assert stop - start <= query.local(tp_size)
        held += range(start, stop)
        key_start, key_stop = key.range(rank, tp_size)
        assert key_stop - key_start <= key.local(tp_size)
        for head in range(start // unit, stop // unit):
            assert key_start // unit <= head // per_group < key_stop // unit
    assert held == list(range(query.full))


@given(st.integers(1, 16), st.integers(1, 12), units, st.integers(1, 16))
def test_key_heads_follow_the_queries_wherever_they_are(
    count: int, per_head: int, unit: int, tp_size: int
) -> None:
    query, key = grouped_heads(count * per_head, count, unit)
    held: set[int] = set()
    for rank in range(tp_size):
        start, stop = (end // unit for end in query.range(rank, tp_size))
        first, last = (end // unit for end in key.range(rank, tp_size))
        assert last - first <= key.local_count(tp_size)
        assert list(range(first, last)) == sorted({one // per_head for one in range(start, stop)})
        held.update(range(first, last))
        sharers = key.sharers(rank, tp_size)
        assert (len(sharers), sum(sharers)) == (
            key.local_count(tp_size),
            query.local_count(tp_size),
        )
        of_queries = [one for one, sharing in enumerate(sharers) for _ in range(sharing)]
        for query_head, key_head in zip(range(start, stop), of_queries, strict=False):
            assert first + key_head == query_head // per_head
    assert held == set(range(count))


@given(st.integers(1, 8), units, tp_sizes)
def test_ranks_share_the_key_heads_that_are_too_few(count: int, unit: int, tp_size: int) -> None:
    assume(max(tp_size, count) % min(tp_size, count) == 0)
    split = Split(count, unit, shared=True)
    ranges = [split.range(rank, tp_size) for rank in range(tp_size)]
    assert ranges == sorted(ranges)
    assert {feature for start, stop in ranges for feature in range(start, stop)} == set(
        range(split.full)
    )
    assert {stop - start for start, stop in ranges} == {split.local(tp_size)}


LINEARS = ["a.0.q", "a.0.k", "a.0.v", "a.1.q", "a.1.k", "a.1.v", "a.0.out", "a.1.out", "head"]
HEADS = QKV("qkv", 8, 4, 4)


def test_every_linear_gets_its_style() -> None:
    plan = Plan({"a.*.{q,k,v}": HEADS, "a.*.out": Row(), "head": Replicated()})
    matches = plan.match(LINEARS)
    assert [(match.parent, match.names, match.style) for match in matches] == [
        ("a.0", ("q", "k", "v"), HEADS),
        ("a.1", ("q", "k", "v"), HEADS),
        ("a.0", ("out",), Row()),
        ("a.1", ("out",), Row()),
        ("", ("head",), Replicated()),
    ]


def test_fused_linears_may_lie_deeper() -> None:
    (match,) = Plan({"b.*.{up,gate.0}": MergedColumn("both")}).match(["b.0.up", "b.0.gate.0"])
    assert (match.parent, match.names) == ("b.0", ("up", "gate.0"))


@pytest.mark.parametrize(
    ("linears", "message"),
    [
        ({"a.*.{q,k,v}": HEADS, "a.*.out": Row()}, r"No pattern matches the linears \['head'\]"),
        ({"a.*.*": Column(), "head": Column(), "a.1.out": Row()}, "are matched twice"),
        ({"a.*.*": Column(), "head": Column(), "b.*": Row()}, r"'b\.\*' matches no linear"),
        ({"*": Column(), "a.*.{q,k,w}": HEADS}, r"\['a.0.w'\] .* do not exist"),
        ({"a": Column()}, "'a' matches no linear"),  # a pattern is a whole path
        ({"*": Column()}, "No pattern matches"),  # and * is one component of it
    ],
)
def test_a_plan_that_does_not_fit_the_model(linears: dict[str, Column], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(linears).match(LINEARS)


def test_a_dot_is_a_dot() -> None:
    with pytest.raises(PlanError, match="matches no linear"):
        Plan({"a.out": Row()}).match(["a_out"])


class TestSizes:
    """Z-Image's 30 heads, and grouped-query attention."""

    def test_padding_makes_sizes_possible_that_do_not_divide(self) -> None:
        plan = Plan({"*.{q,k,v}": QKV("qkv", 128, 30, 30)})
        assert plan.valid_tp_sizes(8) == (1, 2, 3, 4, 5, 6, 8)
        for tp_size in plan.valid_tp_sizes(8):
            plan.check_tp_size(tp_size, "Z-Image")

    def test_a_size_that_wastes_too_much_is_refused(self) -> None:
        plan = Plan({"*.{q,k,v}": QKV("qkv", 128, 30, 30)})
        with pytest.raises(SizeError) as caught:
            plan.check_tp_size(7, "Z-Image")
        assert str(caught.value) == (
            "Z-Image cannot be split over 7 GPUs: its num_heads=30 would have to be padded to 35, "
            "which wastes 17%. Choose one of 1, 2, 3, 4, 5, 6, 8, or 'auto'."
        )

    def test_key_heads_must_divide(self) -> None:
        plan = Plan({"*.{q,k,v}": QKV("qkv", 128, 32, 4)})
        assert plan.valid_tp_sizes(8) == (1, 2, 4, 8)
        with pytest.raises(SizeError, match="num_kv_heads=4 and 3 do not divide one another"):
            plan.check_tp_size(3, "a model")

    @given(st.integers(1, 64), st.integers(1, 64), tp_sizes)
    def test_what_is_valid_is_not_refused(self, heads: int, groups: int, tp_size: int) -> None:
        assume(heads % groups == 0)
        plan = Plan({"*.{q,k,v}": QKV("qkv", 8, heads, groups)})
        valid = plan.valid_tp_sizes(8)
        assert 1 in valid
        if tp_size in valid:
            plan.check_tp_size(tp_size, "a model")
        else:
            with pytest.raises(SizeError, match=f"over {tp_size} GPUs"):
                plan.check_tp_size(tp_size, "a model")
