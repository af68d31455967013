"""Names that are legal on Linux, and places as people write them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tp_runtime.client import CheckpointError, ModelSpec
from tp_runtime.config import WorkerConfig, home, runtime_python
from tp_runtime.settings import PACKAGE

# Runs the package from the folder that it is told, as a fork server would be.
STARTED_FROM = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from tp_runtime.client.launch.environment import code_that_runs, inherited_environment
command = [sys.executable, "-c", code_that_runs("tp_runtime"), "--help"]
sys.exit(subprocess.run(command, cwd="/", env=inherited_environment()).returncode)
"""


@pytest.mark.parametrize("name", [b"pa:ck", b"'quoted\" pack", b"no \xff utf-8"])
def test_the_pack_may_be_in_a_folder_of_any_name(tmp_path: Path, name: bytes) -> None:
    """The runtime's Python finds it there: a colon would end a path of PYTHONPATH."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STARTED_FROM, folder],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "text-to-latents" in done.stdout


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/venv/bin/python", "/home/me/venv/bin/python"),
        ("venv/bin/python", "{here}/venv/bin/python"),  # Ray's driver runs in another folder
        ("/opt/python", "/opt/python"),
        ("python3.12", "python3.12"),  # of the PATH
    ],
)
def test_a_python_as_people_write_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: str, meant: str
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TP_RUNTIME_PYTHON", written)
    assert runtime_python() == meant.format(here=tmp_path)


def test_nobody_has_that_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then it is a folder's name, as for a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TP_RUNTIME_HOME", "~no such user/x")
    assert home() == tmp_path / "~no such user/x"


def test_a_model_whose_name_is_no_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.safetensors")
    Path(path).touch()
    with pytest.raises(CheckpointError, match=r"/m\\udcff\.safetensors is no UTF-8.*Rename"):
        ModelSpec.of(path, "float32", "float32")


def test_variables_that_are_no_utf8_reach_the_ranks() -> None:
    config = WorkerConfig(0, 0, 1, 1, 1, "cpu", 1, "INFO", environment=[(b"A\xff", b"\xfe")])
    assert msgspec.json.decode(msgspec.json.encode(config), type=WorkerConfig) == config
