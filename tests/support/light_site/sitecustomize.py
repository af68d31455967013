"""For a folder on PYTHONPATH: ranks of the Python's processes compute nothing (`light_rank`).

Where a rank is no process that a test starts, as on Ray. What a rank imports of vLLM is replaced as
soon as it is asked for.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

TESTS = str(Path(__file__).resolve().parents[2])


_REPLACED = ("tp_runtime.rank.membership", "tp_runtime.gpu.collectives")


class _Light(MetaPathFinder, Loader):
    def find_spec(self, name: str, *_: Sequence[str] | ModuleType | None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in _REPLACED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        sys.path.append(TESTS)
        from process import light_rank

        light_rank.be_light()
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Light())
