"""What every rank needs, imported once, by the process that ranks are forked from.

Two thirds of the time of a first start are spent here. A third of what vLLM, transformers and
diffusers import by themselves is for others: servers of language models, pictures and sound that
these are given, other kinds of GPUs. It is left out while the rest is imported, and there again
afterwards for whoever asks for it.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

# These are not there for who imports them only if they are: with vLLM 0.26 to 0.33. Not scipy:
# packages need it that transformers imports where they are installed, such as scikit-learn.
LEFT_OUT = ("av", "cv2", "mistral_common", "torchaudio", "torchcodec", "torchvision")
# Modules of vLLM that others of it name a class or a function of, but only use in a server of
# language models, or on ROCm.
STOOD_IN_FOR = (
    "vllm.entrypoints.mcp.tool_server",  # openai
    "vllm.v1.attention.ops.rocm_aiter_mla_sparse",  # fastapi, xgrammar, and much of vLLM
)


class _StandIn(ModuleType):
    """A module whose every public name is a class that nobody can make an instance of."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*_: object, **__: object) -> None:
            raise NotImplementedError(f"{self.__name__} is not imported in a rank: {name} is not")

        return type(name, (), {"__new__": refuse})


@contextlib.contextmanager
def _with(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """In the body, these are imported under their names. None: there is no such module."""
    placed = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(placed)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in placed:
            del sys.modules[name]


def import_all(*, lean: bool = True) -> None:
    """Everything that ranks import, sooner or later.

    ``lean``: without what none of them needs. Then an ImportError may mean that something which is
    installed here does need it.
    """
    absent = dict.fromkeys(LEFT_OUT) | {name: _StandIn(name) for name in STOOD_IN_FOR}
    with _with(absent if lean else {}):
        importlib.import_module("tp_runtime.rank.worker")
        # diffusers imports flashinfer if there is one (quantizers/bfl/utils.py, 0.42), which asks
        # each GPU for its capability (compilation_context.py, 0.6) and thereby initialises CUDA.
        # No driver uses it.
        with _with({"flashinfer": None}):
            importlib.import_module("diffusers.utils.import_utils")  # which looks what there is
        importlib.import_module("diffusers.models.transformers")


class _NoExecutor:
    """Whom a ``VllmConfig`` asks how requests to a language model are to be scheduled."""

    @classmethod
    def get_class(cls, _config: object) -> type:
        return cls

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False


def configuring() -> contextlib.AbstractContextManager[None]:
    """In the body, a ``VllmConfig`` is made without the 1500 modules of vLLM's servers.

    It imports them for one class (config/parallel.py, config/vllm.py, 0.26 to 0.33), and would do
    so in each rank.
    """
    names = ("vllm.v1.executor", "vllm.v1.executor.abstract")
    modules = {name: ModuleType(name) for name in names}
    for module in modules.values():
        module.Executor = _NoExecutor  # type: ignore[attr-defined]
    return _with(modules)
