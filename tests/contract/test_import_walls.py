"""The three import walls: nodes | client half of tp_runtime | rank half.

ComfyUI's process never imports vLLM or diffusers (they pin a torch of their own and take 11 s); a
rank never imports ComfyUI.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import REPOSITORY

RUNTIME = REPOSITORY / "tp_runtime"
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server"}
NODES_MAY_USE = {*sys.stdlib_module_names, *COMFYUI, "aiohttp", "safetensors", "torch"}
RANKS_ONLY = ("vllm", "diffusers", "transformers", "torch.distributed")
MAY_IMPORT_RAY = {"ray_driver.py", "ray_actor.py"}
# What ComfyUI's process imports of tp_runtime; the walk below adds what these import.
CLIENT_ROOTS = ("__init__", "models/__init__")


def _imports(path: Path, *, on_import_only: bool) -> Iterator[tuple[int, str, list[str]]]:
    """(level of relative import, module, names) of each import in a file.

    `on_import_only`: without those inside functions, which run later if at all.
    """
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not (is_function and on_import_only):
            todo.extend(ast.iter_child_nodes(node))


def _absolute(path: Path, *, on_import_only: bool) -> set[str]:
    """Every absolute name that a file imports, as `a.b` and as `a.b.name`."""
    found = set()
    for level, module, names in _imports(path, on_import_only=on_import_only):
        if level == 0:
            found |= {module, *(f"{module}.{name}" for name in names)}
    return found


def _own_modules(path: Path) -> set[Path]:
    """The files of tp_runtime that a file of it imports when it is imported itself."""
    found = set()
    for level, module, names in _imports(path, on_import_only=True):
        if level:
            folder = path.parents[level - 1].joinpath(*module.split(".") if module else ())
            for name in ("", *names):
                candidate = folder / name if name else folder
                found |= {candidate.with_suffix(".py"), candidate / "__init__.py"}
    return {file for file in found if file.is_file()}


def _client_files() -> set[Path]:
    todo = [RUNTIME / f"{root}.py" for root in CLIENT_ROOTS]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo.extend(_own_modules(path))
    return found


def _is_under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _public_names() -> set[str]:
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((RUNTIME / "__init__.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(names)


@pytest.mark.parametrize(
    "path",
    [REPOSITORY / "__init__.py", *sorted((REPOSITORY / "nodes").rglob("*.py"))],
    ids=lambda path: path.relative_to(REPOSITORY).as_posix(),
)
def test_nodes_use_comfyui_and_public_names_only(path: Path) -> None:
    public = _public_names()
    for level, module, names in _imports(path, on_import_only=False):
        if level == 0:
            assert module.partition(".")[0] in NODES_MAY_USE, module
        elif path.parents[level - 1] == REPOSITORY and path.parent != REPOSITORY:
            assert module == "tp_runtime", f"only 'from ..tp_runtime import ...', not {module!r}"
            assert set(names) <= public, f"not in tp_runtime.__all__: {set(names) - public}"
        else:
            assert level == 1, module


def test_the_client_half_is_what_we_think() -> None:
    """The walk reaches the modules that ARCHITECTURE.md counts to the client half, and no other."""
    found = {path.relative_to(RUNTIME).as_posix().removesuffix(".py") for path in _client_files()}
    assert {"engine", "launcher", "protocol", "transport", "tensors", "config", "errors"} <= found
    assert {"runtime", "checkpoint"} <= found
    assert found.isdisjoint({"worker", "runner", "dist", "loading", "sharding/walker"}), found


def test_the_client_half_imports_nothing_of_the_ranks() -> None:
    for path in _client_files():
        forbidden = {
            name for name in _absolute(path, on_import_only=True) if _is_under(name, RANKS_ONLY)
        }
        assert not forbidden, (path, forbidden)


def test_ray_is_imported_by_its_driver_and_its_actors_only() -> None:
    """Neither ComfyUI's process nor the ranks of this machine need it."""
    importing = {
        path.name
        for path in RUNTIME.rglob("*.py")
        if any(_is_under(name, ("ray",)) for name in _absolute(path, on_import_only=False))
    }
    assert importing == MAY_IMPORT_RAY
    assert MAY_IMPORT_RAY.isdisjoint(path.name for path in _client_files())


def test_the_ranks_import_nothing_of_comfyui() -> None:
    for path in RUNTIME.rglob("*.py"):
        forbidden = {
            name
            for name in _absolute(path, on_import_only=False)
            if _is_under(name, tuple(COMFYUI))
        }
        assert not forbidden, (path, forbidden)


_USE_THE_CLIENT = """
import json, sys
import torch, safetensors.torch  # ComfyUI has these; torch brings torch.distributed itself
before = set(sys.modules)
import tp_runtime
info = tp_runtime.inspect_checkpoint(sys.argv[1])
info.valid_tp_sizes()
model = tp_runtime.get_runtime().model(
    tp_runtime.ModelSpec.of(sys.argv[1], "float32", "float32"), tp_runtime.GroupConfig(2, "cpu")
)
model.planned_bytes(), model.loaded_bytes(), tp_runtime.get_runtime().reports()
json.dump(sorted(set(sys.modules) - before), sys.stdout)
"""


def test_using_the_client_half_loads_nothing_of_the_ranks(tiny_z_image: Path) -> None:
    """In a fresh Python: all that ComfyUI's process does before a group is started."""
    done = subprocess.run(
        [sys.executable, "-c", _USE_THE_CLIENT, tiny_z_image],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    forbidden = (*RANKS_ONLY, "ray")
    loaded = [name for name in json.loads(done.stdout) if _is_under(name, forbidden)]
    assert not loaded
