"""Which tests share a worker of pytest-xdist, and why: `make test` has a worker for each core.

A worker is a process of its own: what a fixture of the session or of a module starts, such as a
ComfyUI or a group of ranks, every worker that needs it starts for itself. So all tests of a group
run on one worker, one after the other, in their usual order. Without pytest-xdist (a plain
`pytest tests/unit/test_config.py`) nothing of this is used.

pytest-xdist's own `--dist loadgroup` reads marks, which pytest 9.2 no longer lets it pass on to the
scheduler (pytest-xdist issue 1386): every test would go where there is room. Here the path of a
test's file says its group, and `tests/conftest.py` has this scheduler take the place of that one.
"""

from pathlib import PurePosixPath
from typing import Any

from xdist.scheduler import LoadScopeScheduling

# Group → its files below `tests`, and why. Any other file is a group of its own: its module's
# fixtures (ranks, a home, a fault file) are for it alone, and files run beside one another.
SHARED: dict[str, tuple[str, ...]] = {
    # Ray cannot be told apart by who started it: the checks that nothing of it is left look at the
    # whole machine, and two clusters on two cores do not come up in time.
    "ray": ("hosts/*.py", "process/test_local_ray.py", "comfy/test_ray.py"),
    # Servers of their own, each for its one file.
    "toy": ("comfy/test_toy.py",),
    "early start": ("comfy/test_early_start.py",),
    "ComfyUI benchmark": ("comfy/test_bench_in_comfyui.py",),
    "own Python": ("web/test_own_python.py",),
    "templates": ("web/test_official_templates.py",),
    "ComfyUI": ("comfy/*.py", "web/*.py"),  # the one server of `comfy_server`, and its ranks
    # Both have the nodes' schemas written out by one ComfyUI.
    "schemas": ("contract/test_node_schemas.py", "contract/test_locales.py"),
}
# These take longest: a worker that came to one of them last would run on alone. The rest follows as
# it was collected.
FIRST = (
    "ComfyUI",
    "ray",
    "parity/test_fused_reduction.py",
    "contract/test_wheel.py",
    "process/test_fork_server.py",
    "faults/test_comfyui_killed.py",
    "faults/test_engine_killed.py",
    "faults/test_soak.py",
    "process/test_bench.py",
    "templates",
    "ComfyUI benchmark",
    "toy",
    "process/test_start.py",
    "unit/test_gguf_file.py",
)


def group_of(nodeid: str) -> str:
    """The group of a test: one of SHARED, else its file."""
    file = PurePosixPath(nodeid.partition("::")[0])
    if "tests" in file.parts:
        file = file.relative_to(*file.parts[: file.parts.index("tests") + 1])
    for group, patterns in SHARED.items():
        if any(file.match(pattern) for pattern in patterns):
            return group
    return str(file)


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Gives every group to one worker, those of FIRST first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        for group in FIRST:
            if group in self.workqueue:
                self.workqueue.move_to_end(group, last=False)
                break
        super()._assign_work_unit(node)
