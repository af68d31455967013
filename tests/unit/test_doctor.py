"""`python -m tp_runtime doctor`: a machine that works, and Pythons that do not."""

import sys
import tomllib
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from tp_runtime.client import examine
from tp_runtime.tools.cli import main
from tp_runtime.tools.doctor import REQUIREMENTS


def python_that(folder: Path, script: str) -> str:
    """The path of a program that runs this shell script."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.process
def test_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    status = {line[9:].split("  ")[0]: line.split()[0] for line in lines}
    for name in ("Runtime Python", "torch", "vllm", "diffusers"):
        assert status[name] == "ok"
    assert status["GPUs"] == "missing"
    assert "For GPU use: " in next(line for line in lines if "GPUs" in line)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo broken pipe of pythons >&2; exit 3", "ended with status 3. broken pipe of pythons"),
        ("cat", "does not behave like a Python"),
    ],
)
def test_a_broken_python_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: str, said: str
) -> None:
    python = python_that(tmp_path, script)
    assert main(["doctor", "--python", python]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("failed")
    assert python in line
    assert said in line
    assert "Set TP_RUNTIME_PYTHON" in line


def test_the_environment_names_the_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TP_RUNTIME_PYTHON", "/no/such/python")
    (check,) = examine()
    assert check.text == "/no/such/python does not run: No such file or directory."


def test_a_python_without_the_packages(tmp_path: Path) -> None:
    bare = python_that(tmp_path, f'exec "{sys.executable}" -I -S "$@"')
    found = {check.name: check for check in examine(bare)}
    assert found["vllm"].status == "failed"
    assert f"{bare} -m pip install" in found["vllm"].advice


def test_versions_are_those_of_the_runtime_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["runtime"]
    for name, versions in REQUIREMENTS.items():
        assert f"{name}{versions}" in extra
