"""What becomes of every ``nn.Linear`` of a model under tensor parallelism, as data.

A plan maps patterns of module paths to styles. ``*`` stands for one component of a path;
``{a,b.c}`` at the end lists linears that are fused into one layer, in that order. Nothing here
imports vLLM or diffusers: ComfyUI's process asks a plan for the sizes that work.

The arithmetic of sharding lives in ``Split``: which part of an axis a rank holds, with zeros
where the axis does not divide. Zero rows of q, k and v and zero columns of the output projection
contribute exactly nothing (RMSNorm of zero is zero, a zero v adds zero), so padding is exact.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..errors import SizeError

# A head that only pads costs memory and time; beyond one in eight, another size serves better.
MAX_HEAD_PADDING = 1 / 8


@dataclass(frozen=True)
class Split:
    """How ``count`` units of ``unit`` features each are dealt out to the ranks.

    ``groups`` > 0: the units belong to that many groups (query heads to key/value heads), and
    a rank's units never cross a group. ``shared``: with fewer units than ranks, neighbouring
    ranks hold the same unit (key/value heads of grouped-query attention). ``queries`` > 0: the
    units serve so many others, neighbours the same, which are dealt out evenly: a rank holds those
    that its own need, so neighbouring ranks may hold the same (``sharers``). ``per_head``: each
    unit belongs to a head, so they are dealt out one by one, however few features they have.
    """

    count: int
    unit: int = 1
    groups: int = 0
    shared: bool = False
    queries: int = 0
    per_head: bool = False

    def in_groups(self, group: int) -> "Split":
        """The same with single features dealt out in groups, if those divide them."""
        if self.unit > 1 or self.per_head or self.count % group:
            return self
        return replace(self, count=self.count // group, unit=group)

    @property
    def full(self) -> int:
        """Length of the whole axis."""
        return self.count * self.unit

    def local_count(self, tp_size: int) -> int:
        """Units on each rank, padding included."""
        if self.queries:
            ranges = (self._needed(rank, tp_size) for rank in range(tp_size))
            return max(stop - start for start, stop in ranges)
        if self.groups:
            per_group = self.count // self.groups
            if tp_size <= self.groups:
                return -(-self.groups // tp_size) * per_group
            return -(-per_group // (tp_size // self.groups))
        return -(-self.count // tp_size)

    def local(self, tp_size: int) -> int:
        """Length of each rank's part of the axis, padding included."""
        return self.local_count(tp_size) * self.unit

    def range(self, rank: int, tp_size: int) -> tuple[int, int]:
        """The features [start, stop) of the whole axis that ``rank`` holds, without padding."""
        local = self.local_count(tp_size)
        start, end = rank * local, self.count
        if self.queries:
            start, end = self._needed(rank, tp_size)
        elif self.shared and tp_size > self.count:
            start = rank // (tp_size // self.count)
        elif self.groups and tp_size > self.groups:
            ranks_per_group = tp_size // self.groups
            per_group = self.count // self.groups
            group, place = divmod(rank, ranks_per_group)
            start, end = group * per_group + place * local, (group + 1) * per_group
        start = min(start, end)
        return start * self.unit, min(start + local, end) * self.unit

    def sharers(self, rank: int, tp_size: int) -> tuple[int, ...]:
        """Of each unit on ``rank``, how many of its ``queries`` use it, padding included."""
        served, local = -(-self.queries // tp_size), self.local_count(tp_size)
        first, per_unit = rank * served, self.queries // self.count
        used = [(first + one) // per_unit - first // per_unit for one in range(served)]
        return tuple(sum(min(one, local - 1) == unit for one in used) for unit in range(local))

    def _needed(self, rank: int, tp_size: int) -> tuple[int, int]:
        """The units [start, stop) that the rank's share of ``queries`` uses."""
        served, per_unit = -(-self.queries // tp_size), self.queries // self.count
        start = min(rank * served, self.queries)
        stop = min(start + served, self.queries)
        return start // per_unit, -(-stop // per_unit)


def grouped_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Split, Split]:
    """Heads of queries, dealt out evenly, and of keys and values: on any number of ranks.

    Raises:
        ValueError: they do not belong together.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} heads of queries cannot share {num_kv_heads} of keys")
    return Split(num_heads, head_dim), Split(num_kv_heads, head_dim, queries=num_heads)


def _in_groups(splits: Iterable[Split], group: int) -> tuple[Split, ...]:
    return tuple(split.in_groups(group) for split in splits)


@dataclass(frozen=True)
class Column:
    """``ColumnParallelLinear``: output features are split. ``gather``: and put together again.

    ``segments``: the outputs are several blocks, each of which is split by itself, so that a rank
    holds a part of every block (FLUX.2's ``to_qkv_mlp_proj``); empty means one of single features.
    ``group``: single features are dealt out so many at a time.
    """

    axis: ClassVar[int] = 0
    segments: tuple[Split, ...] = ()
    gather: bool = False
    group: int = 1

    def splits(self, inputs: int, outputs: Sequence[int]) -> tuple[Split, ...]:  # noqa: ARG002
        """How the split axis is dealt out, block by block."""
        return _in_groups(self.segments or (Split(sum(outputs)),), self.group)


@dataclass(frozen=True)
class MergedColumn:
    """``MergedColumnParallelLinear``: several column-parallel linears of one input, as one.

    ``units``: of how many features each is dealt out at a time, or how; empty means single
    features, and these in ``group``s.
    """

    axis: ClassVar[int] = 0
    into: str
    units: tuple[int | Split, ...] = ()
    group: int = 1

    def splits(self, inputs: int, outputs: Sequence[int]) -> tuple[Split, ...]:  # noqa: ARG002
        """How the outputs of each linear are dealt out."""
        units = self.units or (1,) * len(outputs)
        splits = (
            unit if isinstance(unit, Split) else Split(size // unit, unit)
            for size, unit in zip(outputs, units, strict=True)
        )
        return _in_groups(splits, self.group)


@dataclass(frozen=True)
class QKV:
    """``QKVParallelLinear``: query, key and value projections, split by heads."""

    axis: ClassVar[int] = 0
    into: str
    head_dim: int
    num_heads: int
    num_kv_heads: int

    def splits(self, inputs: int = 0, outputs: Sequence[int] = ()) -> tuple[Split, ...]:  # noqa: ARG002
        """How q, k and v are dealt out."""
        if self.num_kv_heads == self.num_heads:
            heads = Split(self.num_heads, self.head_dim)
            return heads, heads, heads
        kv = Split(self.num_kv_heads, self.head_dim, shared=True)
        return Split(self.num_heads, self.head_dim, groups=self.num_kv_heads), kv, kv


@dataclass(frozen=True)
class Row:
    """``RowParallelLinear``: input features are split, the results summed over the ranks.

    ``segments`` describe the input, a concatenation of split activations; empty means one of
    single features. ``group``: single features are dealt out so many at a time.
    """

    axis: ClassVar[int] = 1
    segments: tuple[Split, ...] = ()
    group: int = 1

    def splits(self, inputs: int, outputs: Sequence[int]) -> tuple[Split, ...]:  # noqa: ARG002
        """How the inputs are dealt out, segment by segment."""
        return _in_groups(self.segments or (Split(inputs),), self.group)


@dataclass(frozen=True)
class Replicated:
    """``ReplicatedLinear``: every rank holds the whole."""

    axis: ClassVar[None] = None

    def splits(self, inputs: int, outputs: Sequence[int]) -> tuple[Split, ...]:  # noqa: ARG002
        """Nothing is dealt out."""
        return ()


# ``axis`` of a style: the split one of the weight, 0 for output and 1 for input features.
Style = Column | MergedColumn | QKV | Row | Replicated


class PlanError(Exception):
    """A plan does not fit the model that it was written for: a bug in ``tp_runtime/models``."""


@dataclass(frozen=True)
class Match:
    """One layer to build: the linears it replaces, under their common parent, and its style."""

    parent: str
    names: tuple[str, ...]
    style: Style


@dataclass(frozen=True)
class Plan:
    """The styles of a model's linears, and how vectors are split, by pattern.

    ``vectors``: parameters of one axis that belong to split features (the weight of a norm over all
    heads); every other parameter that is no linear's is whole on every rank. ``once``: the patterns
    of linears that compute nothing in an evaluation: padding does not slow them down.
    """

    linears: Mapping[str, Style] = field(default_factory=dict)
    vectors: Mapping[str, Split] = field(default_factory=dict)
    once: frozenset[str] = frozenset()

    def split_vectors(self, names: Iterable[str]) -> dict[str, Split]:
        """Those of the parameters that are split. Raises PlanError for a pattern without any."""
        names = list(names)
        found: dict[str, Split] = {}
        for pattern, split in self.vectors.items():
            expression = _expression(pattern)
            here = [name for name in names if expression.fullmatch(name)]
            if not here:
                raise PlanError(f"The pattern {pattern!r} matches no parameter of the model.")
            found |= dict.fromkeys(here, split)
        return found

    def match(self, linear_paths: list[str]) -> list[Match]:
        """Pair every linear with its style.

        Raises:
            PlanError: a linear without a pattern or with two, a pattern without a linear, or a
                group of fused linears that is incomplete.
        """
        remaining = dict.fromkeys(linear_paths)
        matches = []
        for pattern, style in self.linears.items():
            found = _groups(pattern, linear_paths)
            if not found:
                raise PlanError(f"The pattern {pattern!r} matches no linear of the model.")
            for parent, names in found:
                paths = [_join(parent, name) for name in names]
                gone = [path for path in paths if path not in remaining]
                if gone:
                    raise PlanError(f"{gone} of {pattern!r} do not exist or are matched twice.")
                for path in paths:
                    del remaining[path]
                matches.append(Match(parent, names, style))
        if remaining:
            raise PlanError(f"No pattern matches the linears {list(remaining)}.")
        return matches

    def in_groups_of(self, group: int) -> "Plan":
        """The plan in which hidden features, between two linears, are dealt out in groups.

        A linear with quantised weights can be cut between groups of columns only, and the linears
        before it must deal out their outputs alike. Where groups do not divide a width, and for
        outputs that are put together again, nothing changes.
        """
        linears = {
            pattern: replace(style, group=group)
            if isinstance(style, Row | MergedColumn)
            or (isinstance(style, Column) and not style.gather)
            else style
            for pattern, style in self.linears.items()
        }
        return replace(self, linears=linears)

    def valid_tp_sizes(self, limit: int) -> tuple[int, ...]:
        """The sizes from 1 to ``limit`` that the model can be split over."""
        return tuple(n for n in range(1, limit + 1) if not any(self._obstacles(n)))

    def check_tp_size(self, tp_size: int, label: str) -> None:
        """Raises SizeError, naming the dimension in the way and the sizes that work."""
        if tp_size < 1:
            raise SizeError(f"A tensor-parallel size of {tp_size} was asked for. Choose 1 or more.")
        for obstacle in self._obstacles(tp_size):
            sizes = ", ".join(map(str, self.valid_tp_sizes(8)))
            raise SizeError(
                f"{label} cannot be split over {tp_size} GPUs: {obstacle}. "
                f"Choose one of {sizes}, or 'auto'."
            )

    def _obstacles(self, tp_size: int) -> Iterator[str]:
        """Why the model cannot be split over so many ranks: heads are dealt out whole."""
        for pattern, style in self.linears.items():
            for split in _fixed_splits(style):
                groups = split.groups
                if groups and max(tp_size, groups) % min(tp_size, groups):
                    yield f"num_kv_heads={groups} and {tp_size} do not divide one another"
                    continue
                padded = split.local_count(tp_size) * tp_size
                if padded > split.count * (1 + MAX_HEAD_PADDING) and pattern not in self.once:
                    yield (
                        f"its num_heads={split.count} would have to be padded to {padded}, "
                        f"which wastes {padded / split.count - 1:.0%}"
                    )


def _fixed_splits(style: Style) -> tuple[Split, ...]:
    """Those of a style's splits that deal out heads; key and value heads follow the queries."""
    splits = style.splits() if isinstance(style, QKV) else getattr(style, "segments", ())
    return tuple(split for split in splits if split.unit > 1 and not split.shared)


def _groups(pattern: str, paths: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """The parent and names of every linear, or group of fused linears, that a pattern matches."""
    fused = re.fullmatch(r"(.*)\.\{([^{}]+)\}", pattern)
    names = tuple(fused[2].split(",")) if fused else ()
    first = f"{fused[1]}.{names[0]}" if fused else pattern
    found = []
    for path in filter(_expression(first).fullmatch, paths):
        name = names[0] if names else path.rpartition(".")[2]
        found.append((path.removesuffix(name).rstrip("."), names or (name,)))
    return found


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


def _join(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name
