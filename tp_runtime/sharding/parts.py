"""Which slice of which stored tensor goes where in a rank's parameters, as data.

``shard_parts`` answers it for the layers that a plan splits; loading, counting bytes and applying
LoRA deltas all follow the same list, so they cannot disagree.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from .plan import QKV, Column, Match, MergedColumn, Plan, PlanError, Replicated, Row, Split

Shape = tuple[int, ...]
SCALE = "weight_scale"  # a layer's parameter, if its weight is held in fp8 with a scale


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
class Block:
    """One of the linears that a layer is made of, along the layer's split axis."""

    path: str
    split: Split


@dataclass(frozen=True)
class Layer:
    """A layer to build: its path, style and the blocks that its split axis consists of.

    ``full`` is (in_features, out_features) of the unsplit layer; ``axis`` the split one: 0 for
    out_features, 1 for in_features, ``None`` if replicated.
    """

    path: str
    match: Match
    full: tuple[int, int]
    axis: int | None
    blocks: tuple[Block, ...]
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
        length = sum(block.split.local(tp_size) for block in self.blocks)
        return (in_features, length) if self.axis == 0 else (length, out_features)


def plan_layers(model: nn.Module, plan: Plan) -> list[Layer]:
    """The layers that the plan makes of the model's linears. Raises PlanError."""
    shapes = {
        path: (module.in_features, module.out_features, module.bias is not None)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    return [layer_of(match, shapes) for match in plan.match(list(shapes))]


def whole_parameters(model: nn.Module, layers: list[Layer]) -> list[str]:
    """Names of the parameters that no layer replaces: every rank holds all of them."""
    replaced = {path for layer in layers for path in layer.replaced}
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in replaced]


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
    full = (in_features, sum(size[1] for size in sizes))
    fused = isinstance(style, QKV | MergedColumn)
    if any((size[0], size[2]) != (in_features, bias) for size in sizes) or fused != (
        len(paths) > 1
    ):
        raise PlanError(f"{paths} cannot be one {type(style).__name__} layer.")
    path = paths[0]
    splits: tuple[Split, ...]
    if isinstance(style, QKV):
        path, splits = f"{parent}.{style.into}", style.splits()
    elif isinstance(style, MergedColumn):
        units = style.units or (1,) * len(paths)
        path = f"{parent}.{style.into}"
        splits = tuple(Split(s[1] // u, u) for s, u in zip(sizes, units, strict=True))
    elif isinstance(style, Column):
        splits = (Split(full[1] // style.unit, style.unit),)
    elif isinstance(style, Row):
        splits = style.segments or (Split(in_features),)
        if sum(split.full for split in splits) != in_features:
            raise PlanError(f"The segments of {path} do not add up to its {in_features} inputs.")
        blocks = tuple(Block(path, split) for split in splits)
        return Layer(path, match, full, 1, blocks, bias)
    else:
        assert isinstance(style, Replicated)
        return Layer(path, match, full, None, (), bias)
    for block_path, split in zip(paths, splits, strict=True):
        if split.full != shapes[block_path][1]:
            raise PlanError(
                f"{block_path} has {shapes[block_path][1]} outputs, its plan {split.full}."
            )
    blocks = tuple(Block(p, split) for p, split in zip(paths, splits, strict=True))
    return Layer(path, match, full, 0, blocks, bias)


def layer_parts(layer: Layer, rank: int, tp_size: int, sources: Sources) -> list[Part]:
    """Every slice that ``rank`` holds of the layer's weight and bias."""
    weight, bias = f"{layer.path}.weight", f"{layer.path}.bias"
    parts: list[Part] = []
    if layer.axis is None:
        parts += whole_parts(weight, sources)
        parts += whole_parts(bias, sources) if layer.bias else []
        return parts
    target_start = source_start = 0
    for block in layer.blocks:
        start, stop = block.split.range(rank, tp_size)
        if layer.axis == 0:
            for name in ("weight", "bias") if layer.bias else ("weight",):
                target = f"{layer.path}.{name}"
                parts += _row_parts(
                    target, target_start, sources(f"{block.path}.{name}"), start, stop
                )
        elif stop > start:
            columns = (source_start + start, source_start + stop)
            for whole in whole_parts(weight, sources):
                # Column ranges of several stacked sources would need a second offset.
                assert whole.target_start == 0, "a row-parallel weight has one source"
                parts.append(Part(weight, 1, target_start, whole.source, whole.rows, columns))
        target_start += block.split.local(tp_size)
        source_start += block.split.full
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
