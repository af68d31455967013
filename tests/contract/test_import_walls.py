"""Walls between the rooms of `tp_runtime`: a folder says who runs it, this table who may use it.

ComfyUI's process never imports vLLM or diffusers (they pin a torch of their own and take 11 s); a
rank never imports ComfyUI, nor anything that only ComfyUI's process needs.
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
COMFYUI |= {"comfyui_version"}
NODES_MAY_USE = {*sys.stdlib_module_names, *COMFYUI, "aiohttp", "safetensors", "torch"}

# The forward half of `models/`, which only ranks import; the other half is data.
FORWARD = "models/forward"
SHARED_ARITHMETIC = ("layers", "pictures", "dual_stream", "residuals", "token_shares")
FAMILY_DATA = ("family", "model_patch", "payload", "rows", "__init__")
SHARED = {"config", "errors", "formats", "machine", "reasons", "settings"}
DATA = SHARED | {"files", "sharding"}
# Room → rooms that its modules may import, beside their own.
ROOMS: dict[str, set[str]] = {
    "__main__": {"tools"},
    "reasons": set(),
    "machine": set(),
    "errors": {"reasons"},
    "formats": set(),
    "settings": {"errors"},
    "config": {"errors", "reasons", "settings"},
    "fault_points": {"errors", "settings"},
    "wire": SHARED,
    "files": SHARED,
    "sharding": SHARED,
    "models": DATA,
    FORWARD: DATA | {"models", "gpu", "fault_points"},
    "recognise": DATA | {"models"},
    "layouts": SHARED | {"models", "recognise", "sharding"},
    "client": DATA | {"wire", "layouts", "recognise", "tools/doctor"},
    "gpu": SHARED | {"sharding", "wire"},
    "rank": DATA | {"wire", "recognise", FORWARD, "gpu", "fault_points"},
    "ray_driver": SHARED | {"wire", "rank/ray_actor"},
    "tools": DATA | {"client", "layouts", "models", "recognise"},
    "tools/doctor": {"machine", "reasons", "settings"},
    "rank/ray_actor": SHARED | {"wire", "rank"},
}
# Packages → the only rooms that import them, also inside functions.
PACKAGES = {
    "vllm": {"rank", "gpu"},
    "diffusers": {"rank", FORWARD},
    "transformers": set(),
    "torch.distributed": {"gpu"},
    "ray": {"ray_driver", "rank/ray_actor"},
}


def room_of(module: str) -> str:
    """The room of a module, by its path below `tp_runtime` (`models/flux/forward`)."""
    first, *rest = module.split("/")
    if module in ROOMS:
        return module
    of_a_family = len(rest) == 2 and rest[1] not in FAMILY_DATA
    if first == "models" and rest and (of_a_family or rest[0] in SHARED_ARITHMETIC):
        return FORWARD
    return first


def _imports(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(level of relative import, module, names) of each import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def _absolute(path: Path) -> set[str]:
    """Every absolute name that a file imports, as `a.b` and as `a.b.name`."""
    found = set()
    for level, module, names in _imports(path):
        if level == 0:
            found |= {module, *(f"{module}.{name}" for name in names)}
    return found


def _own(path: Path) -> set[str]:
    """The modules of `tp_runtime` that a file of it imports, by their paths below it."""
    found = set()
    for level, module, names in _imports(path):
        if level:
            folder = path.parents[level - 1].joinpath(*module.split(".") if module else ())
            names = names if folder.is_dir() else []
            for target in [folder / name for name in names] if names else [folder]:
                inside = target if target.with_suffix(".py").is_file() else target.parent
                inside = target if target.is_dir() else inside
                found.add(inside.relative_to(RUNTIME).as_posix())
    return found - {"."}


def _is_under(name: str, root: str) -> bool:
    return name == root or name.startswith(f"{root}.")


MODULES = sorted(path for path in RUNTIME.rglob("*.py") if path.parent != RUNTIME) + [
    path for path in sorted(RUNTIME.glob("*.py")) if path.name != "__init__.py"
]


def _name(path: Path) -> str:
    return path.relative_to(RUNTIME).with_suffix("").as_posix().removesuffix("/__init__")


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_uses_what_its_room_may(path: Path) -> None:
    room = room_of(_name(path))
    for module in _own(path):
        other = room_of(module)
        assert other == room or other in ROOMS[room] or module in ROOMS[room], (
            f"{_name(path)} ({room}) imports {module} ({other})"
        )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_package_is_imported_in_its_rooms_only(path: Path) -> None:
    room = room_of(_name(path))
    for package, rooms in PACKAGES.items():
        if any(_is_under(name, package) for name in _absolute(path)):
            assert room in rooms, f"{_name(path)} ({room}) imports {package}"
    assert not {name for name in _absolute(path) if name.partition(".")[0] in COMFYUI}


def test_the_table_names_rooms_that_exist() -> None:
    for room in ROOMS:
        assert (RUNTIME / room).is_dir() or (RUNTIME / f"{room}.py").is_file(), room


def test_rooms_form_no_circle() -> None:
    """But for the command line, which is a user of the client; the doctor is one of its tools."""
    order: list[str] = []
    todo = dict(ROOMS)
    while todo:
        free = [room for room, uses in todo.items() if not uses - {room} & todo.keys() - {room}]
        free = [room for room in free if not (ROOMS[room] - {room}) & todo.keys()]
        assert free, f"these use one another: {sorted(todo)}"
        order += free
        for room in free:
            del todo[room]
        if "rank/ray_actor" in todo and "rank" in order:  # a module of rank that starts it
            order.append("rank/ray_actor")
            del todo["rank/ray_actor"]


def _public_names() -> set[str]:
    (names,) = (
        ast.literal_eval(node.value)
        for node in ast.parse((RUNTIME / "client" / "__init__.py").read_text()).body
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
    for level, module, names in _imports(path):
        if level == 0:
            assert module.partition(".")[0] in NODES_MAY_USE, module
        elif path.parents[level - 1] == REPOSITORY and path.parent != REPOSITORY:
            assert module == "tp_runtime.client", f"only the client's names, not {module!r}"
            assert set(names) <= public, f"not in client.__all__: {set(names) - public}"
        else:
            assert level == 1, module


_USE_THE_CLIENT = """
import json, sys
import torch, safetensors.torch  # ComfyUI has these; torch brings torch.distributed itself
before = set(sys.modules)
from tp_runtime import client
info = client.inspect_checkpoint(sys.argv[1])
info.valid_tp_sizes()
model = client.get_runtime().model(
    client.ModelSpec.of(sys.argv[1], "float32", "float32"), client.GroupConfig(2, "cpu")
)
model.planned_bytes(), model.loaded_bytes(), client.get_runtime().reports()
json.dump(sorted(set(sys.modules) - before), sys.stdout)
"""


def test_using_the_client_loads_nothing_of_the_ranks(tiny_z_image: Path) -> None:
    """In a fresh Python: all that ComfyUI's process does before a group is started."""
    done = subprocess.run(
        [sys.executable, "-c", _USE_THE_CLIENT, tiny_z_image],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout)
    forbidden = [*PACKAGES, "tp_runtime.rank", "tp_runtime.gpu", "tp_runtime.ray_driver"]
    assert not [name for name in loaded if any(_is_under(name, root) for root in forbidden)]
    own = [name.removeprefix("tp_runtime.").replace(".", "/") for name in loaded]
    assert not [name for name in own if room_of(name) == FORWARD]
