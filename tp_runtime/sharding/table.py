"""A model's tensors, row by row: where each lies in diffusers' module and in ComfyUI's file, how it
is split, and which tokens pass through it.

One table a model (``models/<family>/family.py``). What the file must hold, where a parameter comes
from, the plan and the costs of an evaluation follow from it, so they cannot disagree.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

from .block_costs import AttentionCosts, BlockCosts, LinearCosts
from .parts import Shape, Source, Sources
from .plan import Plan, Split, Style

# What passes through a linear: the tokens of a stream, of all streams, one row for each item of the
# batch (modulation), or nothing in an evaluation, since it is computed once a prompt.
TEXT, IMAGE, ALL, ITEM, PROMPT = "text", "image", "all", "item", "prompt"


@dataclass(frozen=True)
class Linear:
    """A linear, or several of one input that become one layer.

    ``ours``: its path in the module, below the stack's block; ``{a,b}`` at the end lists several.
    ``file``: its path in the file, or paths in the same way; one path for several linears: their
    rows lie one on another there; empty: the same as ``ours``. ``outputs``: features, of each
    linear if there are several. ``over``: what passes through it. ``swapped``: a diffusers folder
    has the halves of its rows the other way round.
    """

    ours: str
    file: str
    style: Style
    inputs: int
    outputs: int | tuple[int, ...]
    over: str = ALL
    bias: bool = True
    swapped: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Output features of each linear."""
        return (self.outputs,) if isinstance(self.outputs, int) else self.outputs

    def costs(self, tokens: int) -> LinearCosts:
        """Its product with so many rows."""
        splits = self.style.splits(self.inputs, self.sizes)
        full = self.inputs, sum(self.sizes)
        return LinearCosts(self.over, tokens, full, splits, self.style.axis)


@dataclass(frozen=True)
class Tensor:
    """A parameter that is no linear's, or several, by ``{a,b}`` in both names; ``file`` as above.

    ``split``: how its only axis is dealt out; None: every rank holds all of it. ``exact``: held in
    fp32, whatever the model computes in.
    """

    ours: str
    file: str
    shape: Shape
    split: Split | None = None
    exact: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention of a block, over ``heads`` of queries; by streams of tokens.

    ``kv_heads``: of keys and values, where they are others.
    """

    heads: Split
    queries: str = ALL
    keys: str = ALL
    kv_heads: Split | None = None


TableRow = Linear | Tensor


@dataclass(frozen=True)
class Stack:
    """``count`` equal blocks, ``ours.0.…`` in the module and ``file.0.…`` in the file."""

    ours: str
    file: str
    count: int
    rows: tuple[TableRow, ...]
    attentions: tuple[Attention, ...] = ()


@dataclass(frozen=True)
class Table:
    """All tensors of a model: those outside of blocks, and stacks of blocks in their order.

    ``unused``: names and shapes of what files may have and nothing computes with. ``markers``: of
    tensors without values, by which ComfyUI knows which variant a file is of.
    """

    rows: tuple[TableRow, ...]
    stacks: tuple[Stack, ...]
    unused: Mapping[str, Shape] = field(default_factory=dict)
    markers: Mapping[str, Shape] = field(default_factory=dict)

    @cached_property
    def file_tensors(self) -> dict[str, Shape]:
        """Name and shape of every tensor of the file."""
        shapes = dict(self.markers)
        for _, prefix, row in self._all_rows():
            files = expanded(row.file or row.ours)
            if isinstance(row, Tensor):
                shapes |= {prefix + file: row.shape for file in files}
                continue
            sizes = row.sizes if len(files) > 1 else (sum(row.sizes),)
            for file, size in zip(files, sizes, strict=True):
                shapes[f"{prefix}{file}.weight"] = (size, row.inputs)
                if row.bias:
                    shapes[f"{prefix}{file}.bias"] = (size,)
        return shapes

    @cached_property
    def num_elements(self) -> int:
        """Numbers in all of them together."""
        return sum(map(math.prod, self.file_tensors.values()))

    @cached_property
    def outside(self) -> frozenset[str]:
        """Names in the file of the tensors outside of blocks."""
        return frozenset(Table(self.rows, ()).file_tensors)

    @cached_property
    def places(self) -> dict[str, Source]:
        """Parameter of the module → its rows of a tensor of the file."""
        found: dict[str, Source] = {}
        for ours, file, row in self._all_rows():
            names, files = expanded(row.ours), expanded(row.file or row.ours)
            if isinstance(row, Tensor):
                for name, stored in zip(names, files, strict=True):
                    found[ours + name] = Source(file + stored, 0, row.shape[0])
                continue
            if len(files) == 1:
                ranges = list(pairwise(accumulate(row.sizes, initial=0)))
                files *= len(names)
            else:
                ranges = [(0, size) for size in row.sizes]
            for name, stored, (start, stop) in zip(names, files, ranges, strict=True):
                for kind in ("weight", "bias") if row.bias else ("weight",):
                    found[f"{ours}{name}.{kind}"] = Source(f"{file}{stored}.{kind}", start, stop)
        return found

    @property
    def sources(self) -> Sources:
        """Where the file keeps a parameter of the module. Raises KeyError for an unknown one."""
        return lambda parameter: (self.places[parameter],)

    @cached_property
    def swapped(self) -> frozenset[str]:
        """Parameters whose halves lie the other way round in a diffusers folder."""
        return frozenset(
            f"{ours}{row.ours}.{kind}"
            for ours, _, row in self._all_rows()
            if isinstance(row, Linear) and row.swapped
            for kind in ("weight", "bias")
        )

    @cached_property
    def exact(self) -> frozenset[str]:
        """Parameters that are held in fp32, whatever the model computes in."""
        return frozenset(
            ours + name
            for ours, _, row in self._all_rows()
            if isinstance(row, Tensor) and row.exact
            for name in expanded(row.ours)
        )

    @cached_property
    def plan(self) -> Plan:
        """The style of every linear, and how vectors are split."""
        linears: dict[str, Style] = {}
        vectors: dict[str, Split] = {}
        once: set[str] = set()
        parents = [("", self.rows), *((f"{s.ours}.*.", s.rows) for s in self.stacks if s.count)]
        for parent, rows in parents:
            for row in rows:
                if isinstance(row, Linear):
                    linears[parent + row.ours] = row.style
                    if row.over == PROMPT:
                        once.add(parent + row.ours)
                elif row.split is not None:
                    vectors |= {parent + name: row.split for name in expanded(row.ours)}
        return Plan(linears, vectors, frozenset(once))

    @cached_property
    def passing(self) -> dict[str, str]:
        """Linear of a block, by its path in the module → what passes through it."""
        return {
            f"{stack.ours}.{index}.{name}": row.over
            for stack in self.stacks
            for index in range(stack.count)
            for row in stack.rows
            if isinstance(row, Linear)
            for name in expanded(row.ours)
        }

    def block_costs(self, text_tokens: int, image_tokens: int) -> list[BlockCosts]:
        """What one evaluation of one item consists of; blocks of a prompt's own are left out."""
        tokens = {TEXT: text_tokens, IMAGE: image_tokens, ALL: text_tokens + image_tokens}
        found = []
        for stack in self.stacks:
            linears = [row for row in stack.rows if isinstance(row, Linear)]
            passed = tuple(row.costs(tokens[row.over]) for row in linears if row.over in tokens)
            items = tuple(row.costs(1) for row in linears if row.over == ITEM)
            block = BlockCosts(stack.count, passed, items, ())
            attentions = tuple(
                AttentionCosts(
                    one.heads,
                    one.kv_heads or one.heads,
                    tokens[one.queries],
                    tokens[one.keys],
                    block.tokens if one.keys == ALL else block.streams.get(one.keys, 0),
                )
                for one in stack.attentions
                if one.queries in tokens
            )
            if passed:
                found.append(replace(block, attentions=attentions))
        return found

    def _all_rows(self) -> Iterator[tuple[str, str, TableRow]]:
        """Every row, with what stands before its names in the module and in the file."""
        for row in self.rows:
            yield "", "", row
        for stack in self.stacks:
            for index in range(stack.count):
                for row in stack.rows:
                    yield f"{stack.ours}.{index}.", f"{stack.file}.{index}.", row


def expanded(pattern: str) -> list[str]:
    """``a_{b,c}.d`` → ``a_b.d``, ``a_c.d``; a name without braces alone."""
    before, brace, rest = pattern.partition("{")
    names, _, after = rest.partition("}")
    return [f"{before}{name}{after}" for name in names.split(",")] if brace else [pattern]
