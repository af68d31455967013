"""Which slice of which stored tensor goes where in a rank's parameters, as data.

``Sharding.parts`` answers it for a whole module; loading, counting bytes and applying LoRA deltas
all follow the same list, so they cannot disagree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from .plan import QKV, Column, Match, MergedColumn, Plan, PlanError, Split

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Rows [start, stop) of a stored tensor. A parameter is one or several, one on another."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Part:
    """A slice of one stored tensor, and its place in a rank's parameter.

    ``rows``/``columns``: ranges of the stored tensor's first and second axis. ``target_start``:
    where it begins on the parameter's ``axis``.
    """

    target: str
    axis: int
    target_start: int
    source: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        """What the part covers of the axis that is split."""
        start, stop = self.rows if self.columns is None else self.columns
        return stop - start


Sources = Callable[[str], tuple[Source, ...]]


@dataclass(frozen=True)
class Section:
    """A stretch of a layer's split axis that is dealt out by itself.

    ``path``: of the linear that it belongs to; ``first``: where it begins on that linear's axis.
    """

    path: str
    split: Split
    first: int = 0


@dataclass(frozen=True)
class Layer:
    """A layer to build: its path, style and the sections that its split axis consists of.

    ``full`` is (in_features, out_features) of the unsplit layer; ``axis`` the split one: 0 for
    out_features, 1 for in_features, ``None`` if replicated.
    """

    path: str
    match: Match
    full: tuple[int, int]
    axis: int | None
    sections: tuple[Section, ...]
    bias: bool

    @property
    def replaced(self) -> tuple[str, ...]:
        """Paths of the linears that the layer takes the place of."""
        parent = self.match.parent
        return tuple(f"{parent}.{name}" if parent else name for name in self.match.names)

    def local(self, tp_size: int) -> tuple[int, int]:
        """(in_features, out_features) on each rank, padding included."""
        in_features, out_features = self.full
        if self.axis is None:
            return self.full
        length = sum(section.split.local(tp_size) for section in self.sections)
        return (in_features, length) if self.axis == 0 else (length, out_features)


@dataclass(frozen=True)
class Sharding:
    """What a plan makes of a module's parameters, by name.

    ``layers`` take the place of its linears; ``vectors`` are split as given; ``whole`` parameters
    are held by every rank.
    """

    layers: tuple[Layer, ...]
    vectors: Mapping[str, Split]
    whole: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, plan: Plan) -> "Sharding":
        """Raises PlanError if the plan does not fit the module."""
        shapes = {
            path: (module.in_features, module.out_features, module.bias is not None)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear)
        }
        layers = tuple(layer_of(match, shapes) for match in plan.match(list(shapes)))
        replaced = {path for layer in layers for path in layer.replaced}
        others = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name.rpartition(".")[0] not in replaced
        }
        vectors = plan.split_vectors(others)
        for name, split in vectors.items():
            if others[name].shape != (split.full,):
                raise PlanError(f"{name} is {tuple(others[name].shape)}, its plan ({split.full},).")
        return cls(layers, vectors, tuple(name for name in others if name not in vectors))

    def parts(self, rank: int, tp_size: int, sources: Sources) -> list[Part]:
        """Every slice of the file that ``rank`` holds."""
        parts = [part for x in self.layers for part in layer_parts(x, rank, tp_size, sources)]
        for name, split in self.vectors.items():
            parts += _row_parts(name, 0, sources(name), *split.range(rank, tp_size))
        return parts + [part for name in self.whole for part in whole_parts(name, sources)]


def layer_of(match: Match, shapes: Mapping[str, tuple[int, int, bool]]) -> Layer:
    """The layer that a match describes. ``shapes``: path → (in_features, out_features, bias).

    Raises:
        PlanError: the style does not fit the linears' shapes.
    """
    style = match.style
    parent = match.parent
    paths = [f"{parent}.{name}" if parent else name for name in match.names]
    sizes = [shapes[path] for path in paths]
    in_features, _, bias = sizes[0]
    outputs = [size[1] for size in sizes]
    full = (in_features, sum(outputs))
    fused = isinstance(style, QKV | MergedColumn)
    if any((size[0], size[2]) != (in_features, bias) for size in sizes) or fused != (
        len(paths) > 1
    ):
        raise PlanError(f"{paths} cannot be one {type(style).__name__} layer.")
    splits = style.splits(in_features, outputs)
    if isinstance(style, QKV | MergedColumn):
        for path, split, size in zip(paths, splits, outputs, strict=True):
            if split.full != size:
                raise PlanError(f"{path} has {size} outputs, its plan {split.full}.")
        sections = tuple(map(Section, paths, splits))
        return Layer(f"{parent}.{style.into}", match, full, style.axis, sections, bias)
    (path,) = paths
    if style.axis is None:
        return Layer(path, match, full, None, (), bias)
    size, kind = (in_features, "inputs") if style.axis else (full[1], "outputs")
    if sum(split.full for split in splits) != size:
        raise PlanError(f"The segments of {path} do not add up to its {size} {kind}.")
    if isinstance(style, Column) and style.gather and len(splits) > 1:
        raise PlanError(f"{path} has segments: its ranks' outputs are not one stretch to gather.")
    firsts = accumulate((split.full for split in splits[:-1]), initial=0)
    sections = tuple(
        Section(path, split, first) for split, first in zip(splits, firsts, strict=True)
    )
    return Layer(path, match, full, style.axis, sections, bias)


def layer_parts(layer: Layer, rank: int, tp_size: int, sources: Sources) -> list[Part]:
    """Every slice that ``rank`` holds of the layer's weight and bias."""
    weight, bias = f"{layer.path}.weight", f"{layer.path}.bias"
    parts: list[Part] = []
    if layer.axis is None:
        parts += whole_parts(weight, sources)
        parts += whole_parts(bias, sources) if layer.bias else []
        return parts
    target_start = 0
    for section in layer.sections:
        start, stop = (section.first + end for end in section.split.range(rank, tp_size))
        if layer.axis == 0:
            for name in ("weight", "bias") if layer.bias else ("weight",):
                target, rows = f"{layer.path}.{name}", sources(f"{section.path}.{name}")
                parts += _row_parts(target, target_start, rows, start, stop)
        elif stop > start:
            for whole in whole_parts(weight, sources):
                # Column ranges of several stacked sources would need a second offset.
                assert whole.target_start == 0, "a row-parallel weight has one source"
                part = Part(weight, 1, target_start, whole.source, whole.rows, (start, stop))
                parts.append(part)
        target_start += section.split.local(tp_size)
    if layer.axis == 1 and layer.bias:
        parts += whole_parts(bias, sources)  # vLLM adds it on rank 0 only
    return parts


def whole_parts(target: str, sources: Sources) -> list[Part]:
    """All of a parameter, which every rank holds."""
    parts, place = [], 0
    for source in sources(target):
        parts.append(Part(target, 0, place, source.name, (source.start, source.stop)))
        place += source.stop - source.start
    return parts


def _row_parts(
    target: str, target_start: int, sources: tuple[Source, ...], start: int, stop: int
) -> list[Part]:
    """Rows [start, stop) of the stack of ``sources``, placed from ``target_start`` on."""
    parts, base = [], 0
    for source in sources:
        length = source.stop - source.start
        low, high = max(start, base), min(stop, base + length)
        if low < high:
            rows = (source.start + low - base, source.start + high - base)
            parts.append(Part(target, 0, target_start + low - start, source.name, rows))
        base += length
    return parts
