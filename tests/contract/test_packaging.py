"""What is installed is what pyproject.toml declares, light, and complete for ComfyUI."""

import re
import tomllib
from typing import Any

import pytest

from support.paths import REPOSITORY
from tp_runtime.ray_driver.driver import REQUIREMENT


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def requirement_lines(name: str) -> list[str]:
    lines = (REPOSITORY / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def package(requirement: str) -> str:
    return re.split(r"[<>=\[]", requirement)[0].lower().replace("_", "-")


def test_requirements_are_the_declared_dependencies(pyproject: dict[str, Any]) -> None:
    assert requirement_lines("requirements.txt") == pyproject["project"]["dependencies"]


def test_the_runtimes_requirements_are_the_extra(pyproject: dict[str, Any]) -> None:
    extra = pyproject["project"]["optional-dependencies"]["runtime"]
    assert requirement_lines("requirements-runtime.txt") == extra


def test_ray_is_asked_for_as_the_extra_is(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["optional-dependencies"]["ray"] == [REQUIREMENT]


def test_nobody_is_told_to_install_this_folder() -> None:
    """setuptools would leave `build` and `*.egg-info` in `custom_nodes`."""
    documents = [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md")]
    code = [*REPOSITORY.glob("tp_runtime/**/*.py"), *REPOSITORY.glob("nodes/*.py")]
    for path in (*documents, *code):
        for command in re.findall(r"pip install [^\n]+", path.read_text()):
            assert not re.search(r"\[(runtime|ray|gguf)|install (-e|\.)", command), path


def test_requirements_leave_comfyuis_torch_alone() -> None:
    """vLLM pins an exact torch: installing it into ComfyUI's Python must be the user's decision."""
    heavy = {"torch", "vllm", "diffusers", "transformers"}
    assert heavy.isdisjoint(map(package, requirement_lines("requirements.txt")))


def test_development_versions_cover_every_extra(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    declared = [*pyproject["project"]["dependencies"], *(r for rs in extras.values() for r in rs)]
    pinned = set(map(package, requirement_lines("requirements-dev.txt")))
    assert set(map(package, declared)) <= pinned


def test_the_archive_has_what_comfyui_shows() -> None:
    left_out = set(requirement_lines(".comfyignore"))
    for name in ("web", "locales", "example_workflows", "docs", "examples"):
        assert (REPOSITORY / name).is_dir()
        assert left_out.isdisjoint({name, f"{name}/"})
    assert (REPOSITORY / "icon.png").is_file()


def test_every_template_has_a_picture() -> None:
    folder = REPOSITORY / "example_workflows"
    templates = {path.stem for path in folder.glob("*.json")}
    assert templates == {path.stem for path in folder.glob("*.jpg")}
    assert len(templates) == 10


def test_every_help_page_shows_its_node() -> None:
    for page in (REPOSITORY / "web/docs").glob("*.md"):
        (picture,) = re.findall(r"!\[.+\]\((.+)\)", page.read_text())
        assert (page.parent / picture).is_file(), page.name
