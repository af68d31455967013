"""The pack's modules in this process, as ComfyUI imports them: under a name of its choosing."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

import tp_runtime.client
from support.native import import_comfy
from support.paths import REPOSITORY


@contextmanager
def pack_module(name: str) -> Iterator[ModuleType]:
    """A module of the pack, such as `nodes.weights`."""
    import_comfy()
    spec = importlib.util.spec_from_file_location(
        "the_pack", REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    assert spec is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "the_pack", importlib.util.module_from_spec(spec))
        # Its classes and errors are those that tests import.
        patch.setitem(sys.modules, "the_pack.tp_runtime", tp_runtime)
        patch.setitem(sys.modules, "the_pack.tp_runtime.client", tp_runtime.client)
        yield importlib.import_module(f"the_pack.{name}")
