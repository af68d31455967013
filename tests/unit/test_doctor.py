"""`python -m tp_runtime doctor`: a machine that works, and Pythons that do not."""

import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest

from support.paths import REPOSITORY
from tp_runtime.client import examine
from tp_runtime.layouts.link_records import FILE, LinkRates, LinkRecords
from tp_runtime.tools import doctor
from tp_runtime.tools.cli import COMMANDS, main
from tp_runtime.tools.doctor import DEPENDENCIES, REQUIREMENTS, Check


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
    for name in ("This Python", "Runtime Python", "torch", "vllm", "diffusers"):
        assert status[name] == "ok"
    assert status["GPUs"] == "missing"
    assert "For GPU use: " in next(line for line in lines if "GPUs" in line)


LINKED: dict[str, Any] = {
    "python": "3.12.1",
    "cuda_build": "12.8",
    "packages": {},
    "gpus": 2 * [{"name": "NVIDIA GeForce RTX 4090", "total_bytes": 24 * 2**30}],
    "apart": [[0, 1]],
    "nccl": "2.27",
}


def link_of(monkeypatch: pytest.MonkeyPatch, home: Path) -> Check:
    """What is said of the link of two GPUs; ``home``: where the records are."""
    monkeypatch.setattr(doctor, "_probe", lambda _: LINKED)
    monkeypatch.setenv("TP_RUNTIME_HOME", str(home))
    return next(check for check in examine(sys.executable) if check.name == "Link")


def test_the_link_between_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "not measured yet" in link_of(monkeypatch, tmp_path).text
    gpus = [f"{index} NVIDIA GeForce RTX 4090" for index in range(2)]
    records = LinkRecords(tmp_path / FILE)
    records.begin(gpus)
    assert "not measured yet" in link_of(monkeypatch, tmp_path).text
    records.add(gpus, LinkRates(12e9, 17.5e9, 1e-5))
    check = link_of(monkeypatch, tmp_path)
    assert check.text == ("measured on the GPUs 0, 1: 12.0 GB/s in sums, 17.5 GB/s in exchanges.")
    assert "plan --predict --model NAME --tp 2" in check.advice
    records.add(gpus, LinkRates(12e9, 17.5e9, 1e-5, 24e9))
    assert "in exchanges, 24.0 GB/s from the host's memory." in link_of(monkeypatch, tmp_path).text
    (tmp_path / FILE).write_text("[]")
    assert "not measured yet" in link_of(monkeypatch, tmp_path).text


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("NVIDIA GeForce RTX 4090", "ok", "GeForce cards cannot"),
        ("NVIDIA H200", "missing", "NCCL goes through the host's memory"),
    ],
)
def test_gpus_that_do_not_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, name: str, status: str, words: str
) -> None:
    gpus = [one | {"name": name} for one in LINKED["gpus"]]
    found = LINKED | {"gpus": gpus, "apart": [[0, 1]]}
    monkeypatch.setattr(doctor, "_probe", lambda _: found)
    check = next(check for check in examine(sys.executable) if check.name == "P2P")
    assert check.status == status
    assert words in check.text


def test_a_gpu_that_another_program_has_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB"
    monkeypatch.setattr(doctor, "_probe", lambda _: LINKED | {"nccl_error": error})
    check = next(check for check in examine(sys.executable) if check.name == "NCCL")
    assert check.status == "failed"
    assert "Another program holds it" in check.advice


def test_gpus_that_are_not_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"name": "NVIDIA GeForce RTX 3060", "total_bytes": 12 * 2**30}
    for gpus, said in ((LINKED["gpus"], False), ([*LINKED["gpus"], small], True)):
        monkeypatch.setattr(doctor, "_probe", lambda _, gpus=gpus: LINKED | {"gpus": gpus})
        check = next(check for check in examine(sys.executable) if check.name == "GPUs")
        assert check.status == "ok"
        assert ("They are not alike" in check.advice) == said


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo broken pipe of pythons >&2; exit 3", "exited with status 3. broken pipe of pythons"),
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


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the standard library and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def in_python(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m tp_runtime` with these arguments, in the checkout."""
    ours = ("PYTHON", "TP_RUNTIME")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [python, "-m", "tp_runtime", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_needs_no_package(empty_python: Path) -> None:
    done = in_python(empty_python, "doctor")
    assert done.returncode == 1
    assert done.stderr == ""
    lines = {re.split("  +", line[9:])[0]: line for line in done.stdout.splitlines()}
    failed = {name for name, line in lines.items() if line.startswith("failed")}
    packages = {"torch", "vllm", "diffusers", "msgspec", "safetensors"}
    assert failed == {"This Python", "Log folder", *packages}
    assert "lacks msgspec, platformdirs, psutil, safetensors, torch." in lines["This Python"]
    install = f"Run: {empty_python} -m pip install -r {REPOSITORY}/requirements.txt"
    assert lines["This Python"].endswith(install)
    assert "Use ComfyUI's Python, which has torch." in lines["This Python"]
    files = f"-r {REPOSITORY}/requirements.txt -r {REPOSITORY}/requirements-runtime.txt"
    for words in (
        f"~/tp-runtime/bin/python -m pip install {files}",
        "'Python of the GPU processes'",
        f"(Installed into {empty_python} itself, vLLM replaces its torch",
    ):
        assert words in lines["msgspec"]
    assert "not known without platformdirs" in lines["Log folder"]


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"doctor"}))
def test_other_commands_say_which_package_is_missing(empty_python: Path, command: str) -> None:
    done = in_python(empty_python, command, "--help")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: '{command}' needs the package ")
    assert "python -m tp_runtime doctor" in line


def test_the_commands_are_listed_without_any_package(empty_python: Path) -> None:
    done = in_python(empty_python, "--help")
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert command in done.stdout


def test_dependencies_are_those_of_the_package() -> None:
    """And torch, which comes with ComfyUI."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = [re.split("[<>=]", requirement)[0] for requirement in project["dependencies"]]
    assert sorted([*declared, "torch"]) == sorted(DEPENDENCIES)


def test_versions_are_those_of_the_runtime_extra() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["runtime"]
    for name, versions in REQUIREMENTS.items():
        assert f"{name}{versions}" in extra
