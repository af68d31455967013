"""The wheel, installed where there is no checkout: every command works, or says why not.

Its dependencies are not installed again: the new Python finds those of this one, which hold
neither the package nor `bench`.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.paths import REPOSITORY
from tp_runtime.models import families
from tp_runtime.tools.cli import COMMANDS

pytestmark = [pytest.mark.process, pytest.mark.rotates(3)]

Run = Callable[..., subprocess.CompletedProcess[str]]


def _new_python(folder: Path) -> Path:
    """A Python without any package; returns its folder for them."""
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    return packages


def _build(folder: Path) -> Path:
    """The wheel, of a copy: setuptools would keep files in the checkout, and take old ones."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "__init__.py"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("tp_runtime", "nodes", "bench"):
        shutil.copytree(
            REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    _pip("wheel", *options, str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the installed package's command line, or another program, in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    packages = _new_python(folder / "venv")
    _pip(
        *("install", "--no-deps", "--no-index", "--no-compile", "--target", str(packages)),
        str(_build(folder)),
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = folder / "empty"
    empty.mkdir()
    # No PYTHONPATH, which may name the checkout.
    ours = ("PYTHON", "TP_RUNTIME")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"TP_RUNTIME_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}

    def in_empty_folder(
        *arguments: str, program: tuple[str, str] = ("-m", "tp_runtime")
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [folder / "venv" / "bin" / "python", *program, *arguments],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return in_empty_folder


def works(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_the_checkout_is_out_of_reach(run: Run) -> None:
    """Else the other tests would show nothing."""
    program = (
        "import importlib.util, sys, tp_runtime; print(tp_runtime.__file__, sys.prefix);"
        "print(*map(importlib.util.find_spec, ['bench', 'nodes', 'tests']))"
    )
    first, second = works(run(program=("-c", program))).splitlines()
    file, prefix = first.split()
    assert Path(file).is_relative_to(prefix)
    assert second == "None None None"


def test_the_commands_are_listed(run: Run) -> None:
    shown = works(run("--help"))
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"bench"}))
def test_every_command_has_its_help(run: Run, command: str) -> None:
    assert works(run(command, "--help")).startswith(f"usage: python -m tp_runtime {command}")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--models", "flux")])
def test_bench_says_that_it_needs_a_checkout(run: Run, arguments: tuple[str, ...]) -> None:
    done = run("bench", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: 'bench' runs from a checkout of the repository")


def test_doctor(run: Run) -> None:
    lines = works(run("doctor")).splitlines()
    assert {line.split()[0] for line in lines} == {"ok", "missing"}


def test_doctor_names_the_packages_to_install(run: Run, tmp_path: Path) -> None:
    """There is no checkout whose path pip could be given."""
    _new_python(tmp_path / "bare")
    done = run("doctor", "--python", str(tmp_path / "bare" / "bin" / "python"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.split()[1:2] == ["vllm"])
    advice = line.partition("-m pip install ")[2].partition(", or set ")[0]
    for package in ("msgspec>=", "vllm<=0.33.0,>=0.26", "diffusers<", "setproctitle>="):
        assert f"'{package}" in advice
    assert "pytest" not in advice
    assert str(REPOSITORY) not in advice


def test_plan(run: Run, tiny_z_image: Path) -> None:
    assert "34 layers stand for 52 linears" in works(run("plan", str(tiny_z_image), "--tp", "4"))


@pytest.mark.parametrize("model", sorted(families()))
def test_the_published_sizes_are_known(run: Run, model: str) -> None:
    shown = works(run("plan", "--predict", "--model", model, "--tp", "4", "--device", "H200"))
    assert shown.startswith(families()[model].label)
    lines = [line.split() for line in shown.splitlines()]
    first = next(index for index, words in enumerate(lines) if words[:1] == ["layout"])
    layouts = [words[0] for words in lines[first + 1 :]]
    shared = ["2x2x1", "1x2x2", "1x4x1"] if families()[model].shares_tokens else []
    assert layouts == ["4x1", "2x2", "1x4", *shared]


def test_models(run: Run) -> None:
    shown = works(run("models"))
    assert all(f"({name})" in shown for name in families())


def test_text_to_latents(run: Run, tiny_z_image: Path, tmp_path: Path) -> None:
    """The ranks are started from the installed package, too."""
    conditioning, output = tmp_path / "c.safetensors", tmp_path / "o.safetensors"
    save_file({"context": torch.randn(1, 20, 64)}, conditioning)
    arguments = ["text-to-latents", str(tiny_z_image), str(conditioning), str(output)]
    arguments += ["--tp", "1", "--size", "64", "64", "--steps", "1", "--dtype", "float32"]
    works(run(*arguments))
    latents = load_file(output)["samples"]
    assert latents.shape == (1, 16, 8, 8)
    assert bool(latents.isfinite().all())
