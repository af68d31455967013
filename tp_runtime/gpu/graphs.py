"""Makes a model's evaluation fast on a GPU: fused element-wise kernels and CUDA graphs.

An evaluation is hundreds of small kernels beside its matrix products. ``fused`` compiles chains of
element-wise operations into one kernel each; ``RecordedEvaluation`` records a whole evaluation,
collectives included, and replays it with one launch. On the CPU, and with ``optimize`` off, neither
does anything.
"""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.utils import _pytree as pytree

F = TypeVar("F", bound=Callable[..., Any])

MAX_GRAPHS = 8  # a graph keeps its activations: a bounded number of shapes
# Each number of tokens is compiled for itself, kept on disk too. Beyond dynamo's own limits (8 and
# 256) a function would run as it is written from then on, and be recorded so.
MAX_COMPILATIONS = 2**16

# q, k, v (B, L, N, K) and a mask or None → (B, L, N, K)
Attention = Callable[..., torch.Tensor]

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)
_attention: ContextVar[Attention | None] = ContextVar("attention", default=None)


def fused(function: F) -> F:
    """A chain of element-wise operations that becomes one kernel while an evaluation is optimised.

    The function must be pure; its arguments: tensors, plain values, and named tuples of them.
    """

    @functools.cache  # not at import: ComfyUI's process imports this and never compiles
    def compiled() -> Any:
        config = torch._dynamo.config
        config.recompile_limit = config.accumulated_recompile_limit = MAX_COMPILATIONS
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return compiled()(*args) if _compiling.get() else function(*args)

    return call  # type: ignore[return-value]


def optimising() -> bool:
    """Whether the evaluation that runs now is to be fast rather than plain."""
    return _compiling.get()


def fast_attention() -> Attention | None:
    """What computes attention, past torch's own choice, while an evaluation is optimised."""
    return _attention.get()


@contextlib.contextmanager
def _optimised(attention: Attention | None = None) -> Iterator[None]:
    tokens = _compiling.set(True), _attention.set(attention)
    try:
        yield
    finally:
        _compiling.reset(tokens[0])
        _attention.reset(tokens[1])


class _Graph:
    """A recorded evaluation with the tensors that it reads and writes."""

    def __init__(
        self,
        evaluate: Callable[..., Any],
        leaves: Sequence[Any],
        tree: pytree.TreeSpec,
        capture: Callable[[], contextlib.AbstractContextManager[torch.cuda.Stream]],
        pool: Any,
    ) -> None:
        firsts = _firsts(leaves)
        # By the index of the first leaf that is that tensor.
        self._static = {index: _dense(leaves[index], copy=True) for index in dict.fromkeys(firsts)}
        tensors = [one for one in self._static.values() if isinstance(one, torch.Tensor)]
        self.input_bytes = sum(tensor.nbytes for tensor in tensors)
        arguments = pytree.tree_unflatten([self._static[index] for index in firsts], tree)
        self._graph = torch.cuda.CUDAGraph()
        with capture() as stream, torch.cuda.graph(self._graph, stream=stream, pool=pool):
            self._output = evaluate(**arguments)
        self._last: dict[int, Any] = {}

    def replay(self, leaves: Sequence[Any]) -> Any:
        """The result for other tensors of the same shapes; valid until the next replay."""
        for index, static in self._static.items():
            leaf = leaves[index]
            # Conditioning is the same object at every evaluation of a generation: copied once.
            if isinstance(leaf, torch.Tensor) and leaf is not self._last.get(index):
                static.copy_(leaf)
                self._last[index] = leaf
        self._graph.replay()
        return self._output


class RecordedEvaluation:
    """A forward's evaluation; from the second time it sees shapes, replayed from a CUDA graph.

    ``capture`` opens vLLM's context for recording collectives and yields the stream for it.
    ``attention`` is what ``fast_attention`` gives meanwhile. A graph has a copy of its inputs, and
    conditioning may be large: beyond ``limit_bytes`` of them all, graphs that were used longest ago
    go; the last one stays. ``largest``: of a graph's bytes, those of the rank that has the most;
    ranks have to drop the same graphs, since a recorded exchange has its place in a ring.
    """

    def __init__(
        self,
        evaluate: Callable[..., Any],
        capture: Callable[[], contextlib.AbstractContextManager[torch.cuda.Stream]],
        attention: Attention,
        limit_bytes: int,
        largest: Callable[[int], int] = int,
    ) -> None:
        self._evaluate = evaluate
        self._limit_bytes = limit_bytes
        self._largest = largest
        self._attention = attention
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()

    def __call__(self, **inputs: Any) -> Any:
        """Same arguments and result as the evaluation."""
        leaves, tree = pytree.tree_flatten(inputs)
        key = tree, *_firsts(leaves), *map(_described, leaves)
        if key not in self._graphs:
            self._remember(key, None)
            # Laid out as the graph's copies will be: kernels are compiled and chosen here, for
            # which there is no room while a graph is recorded.
            dense = pytree.tree_unflatten([_dense(leaf) for leaf in leaves], tree)
            with _optimised(self._attention):
                return self._evaluate(**dense)
        graph = self._graphs[key]
        if graph is None:
            with _optimised(self._attention):
                graph = _Graph(self._evaluate, leaves, tree, self._capture, self._pool)
            graph.input_bytes = self._largest(graph.input_bytes)
            self._remember(key, graph)
        self._graphs.move_to_end(key)
        return graph.replay(leaves)

    def _remember(self, key: Any, graph: _Graph | None) -> None:
        self._graphs[key] = graph
        while len(self._graphs) > MAX_GRAPHS or (
            len(self._graphs) > 1 and self._input_bytes() > self._limit_bytes
        ):
            self._graphs.popitem(last=False)

    def _input_bytes(self) -> int:
        return sum(graph.input_bytes for graph in self._graphs.values() if graph is not None)


def _firsts(leaves: Sequence[Any]) -> list[int]:
    """For each leaf, the index of the first that is the same tensor, or its own.

    A ControlNet may give one tensor to many blocks.
    """
    first: dict[int, int] = {}
    return [
        first.setdefault(id(leaf), index) if isinstance(leaf, torch.Tensor) else index
        for index, leaf in enumerate(leaves)
    ]


def _dense(leaf: Any, *, copy: bool = False) -> Any:
    """The same numbers without gaps between them, if it is a tensor."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.clone(memory_format=torch.contiguous_format) if copy else leaf.contiguous()


def _described(leaf: Any) -> Hashable:
    """What a recorded evaluation depends on: a tensor's shape and dtype, or a plain value."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype
    value: Hashable = leaf
    return value
