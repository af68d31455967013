"""Makes a driver's step fast on a GPU: fused element-wise kernels and CUDA graphs. Rank half.

A step is hundreds of small kernels beside its matrix products. ``fused`` compiles chains of
element-wise operations into one kernel each; ``GraphedStep`` records a whole step, collectives
included, and replays it with one launch. On the CPU, and with ``optimize`` off, neither does
anything.
"""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

F = TypeVar("F", bound=Callable[..., Any])

MAX_GRAPHS = 8  # a graph keeps its activations: a bounded number of shapes

_compiling: ContextVar[bool] = ContextVar("compiling", default=False)

# Best first for a Hopper GPU; the later ones take what the earlier refuse.
_ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def fused(function: F) -> F:
    """A chain of element-wise operations that becomes one kernel while a step is optimised.

    The function must be pure, and its arguments tensors and plain numbers.
    """

    @functools.cache  # not at import: ComfyUI's process imports this and never compiles
    def compiled() -> Any:
        return torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return compiled()(*args) if _compiling.get() else function(*args)

    return call  # type: ignore[return-value]


def optimising() -> bool:
    """Whether the step that runs now is to be fast rather than plain."""
    return _compiling.get()


@contextlib.contextmanager
def _optimised() -> Iterator[None]:
    token = _compiling.set(True)
    try:
        with sdpa_kernel(_ATTENTION, set_priority=True):
            yield
    finally:
        _compiling.reset(token)


class _Graph:
    """A recorded step with the tensors that it reads and writes."""

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        inputs: Any,
        capture: Callable[[], contextlib.AbstractContextManager[torch.cuda.Stream]],
        pool: Any,
    ) -> None:
        leaves, self._tree = pytree.tree_flatten(inputs)
        self._static = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        arguments = pytree.tree_unflatten(self._static, self._tree)
        self._graph = torch.cuda.CUDAGraph()
        with capture() as stream, torch.cuda.graph(self._graph, stream=stream, pool=pool):
            self._output = step(**arguments)
        self._last: list[Any] = [None] * len(leaves)

    def replay(self, inputs: Any) -> torch.Tensor:
        """The step's result for other tensors of the same shapes; valid until the next replay."""
        for index, leaf in enumerate(pytree.tree_leaves(inputs)):
            # Conditioning is the same object at every step of a generation: copied once.
            if isinstance(leaf, torch.Tensor) and leaf is not self._last[index]:
                self._static[index].copy_(leaf)
                self._last[index] = leaf
        self._graph.replay()
        return self._output


class GraphedStep:
    """A driver's step; from the second time that shapes are seen, replayed from a CUDA graph.

    ``capture`` opens vLLM's context for recording collectives and yields the stream for it.
    """

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        capture: Callable[[], contextlib.AbstractContextManager[torch.cuda.Stream]],
    ) -> None:
        self._step = step
        self._capture = capture
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: OrderedDict[Any, _Graph | None] = OrderedDict()

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Same arguments and result as the step."""
        key = _shapes(inputs)
        if key not in self._graphs:
            self._remember(key, None)
            with _optimised():
                return self._step(**inputs)
        graph = self._graphs[key]
        if graph is None:
            with _optimised():
                graph = _Graph(self._step, inputs, self._capture, self._pool)
            self._remember(key, graph)
        self._graphs.move_to_end(key)
        return graph.replay(inputs)

    def _remember(self, key: Any, graph: _Graph | None) -> None:
        self._graphs[key] = graph
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)


def _shapes(inputs: Any) -> Any:
    leaves, tree = pytree.tree_flatten(inputs)
    described = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    )
    return described, tree
