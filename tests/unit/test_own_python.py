"""A Python for the GPU processes: made, failed, given up; with real environments and a real pip."""

import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.waiting import wait_until
from tp_runtime.client import InputError, OwnPython
from tp_runtime.client import own_python as module


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    return tmp_path / "requirements.txt"


@pytest.fixture
def own(tmp_path: Path, requirements: Path) -> Iterator[OwnPython]:
    made = OwnPython(tmp_path / "home" / "python", [requirements])
    yield made
    made.cancel()


@pytest.fixture
def index_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "5")  # it says that it tries again
        yield


def ended(own: OwnPython) -> bool:
    return own.progress().state != "making"


def test_it_is_made(tmp_path: Path, own: OwnPython, requirements: Path) -> None:
    requirements.write_text("# nothing\n")
    assert own.progress().state == "absent"
    own.make()
    own.make()  # as impatient people do
    assert own.progress().state == "making"
    wait_until(lambda: ended(own), within_s=300)
    assert own.progress().error == ""
    assert own.progress().state == "ready"
    prefix = subprocess.check_output([own.python, "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(prefix.strip()) == tmp_path / "home" / "python"
    # ComfyUI's next start finds it.
    assert OwnPython(tmp_path / "home" / "python", [requirements]).progress().state == "ready"


def test_it_needs_no_folder_for_temporary_files(
    tmp_path: Path, requirements: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither does ComfyUI's start, which looks whether there is one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    requirements.write_text("")
    own = OwnPython(tmp_path / "home" / "python", [requirements])
    assert own.progress().state == "absent"
    own.make()
    wait_until(lambda: own.progress().line != "" or ended(own), within_s=60)
    own.cancel()


def test_what_pip_says_is_the_error(
    tmp_path: Path, own: OwnPython, requirements: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    requirements.write_text("no-such-package==1\n")
    own.make()
    wait_until(lambda: ended(own), within_s=300)
    assert own.progress().state == "failed"
    assert "No matching distribution found for no-such-package==1" in own.progress().error
    assert re.search(rf"-m pip install --no-input .* -r {requirements}", own.progress().error)
    assert not (tmp_path / "home" / "python").exists()


@pytest.mark.usefixtures("index_that_never_answers")
def test_it_is_given_up(tmp_path: Path, own: OwnPython, requirements: Path) -> None:
    requirements.write_text("some-package==1\n")
    own.make()
    # Making the environment prints nothing, and takes a while.
    wait_until(lambda: "-m venv --clear" in own.progress().line, within_s=10)
    wait_until(lambda: "some-package" in own.progress().line, within_s=300)
    pip = [child for child in psutil.Process().children() if str(requirements) in child.cmdline()]
    assert len(pip) == 1
    own.cancel()
    assert (own.progress().state, own.progress().error) == ("absent", "")
    assert not pip[0].is_running()
    assert not (tmp_path / "home" / "python").exists()


@pytest.mark.usefixtures("index_that_never_answers")
def test_it_says_what_it_has_written(
    own: OwnPython, requirements: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [20 * 2**30]
    monkeypatch.setattr(module, "_free_bytes", lambda _: free[0])
    requirements.write_text("some-package==1\n")
    assert own.progress().written_bytes == 0
    own.make()
    free[0] -= 3 * 2**30
    assert own.progress().written_bytes == 3 * 2**30
    free[0] += 4 * 2**30  # somebody else's
    assert own.progress().written_bytes == 0


def test_without_room_nothing_begins(own: OwnPython, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_bytes", lambda _: 3 * 2**30)
    with pytest.raises(InputError, match=r"has 3\.0 GiB of free disk.*TP_RUNTIME_HOME"):
        own.make()
    assert own.progress().state == "absent"


def test_a_python_that_is_too_old_makes_none(
    own: OwnPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own.refusal == ""
    monkeypatch.setattr(module, "OLDEST_PYTHON", (9, 0))
    with pytest.raises(
        InputError, match=r"ComfyUI's Python is 3\.\d+, that .* has to be 9\.0 or newer"
    ):
        own.make()
    assert own.progress().state == "absent"


@pytest.mark.usefixtures("index_that_never_answers")
def test_two_servers_do_not_make_it_at_once(
    tmp_path: Path, own: OwnPython, requirements: Path
) -> None:
    requirements.write_text("some-package==1\n")
    other = OwnPython(tmp_path / "home" / "python", [requirements])
    own.make()
    with pytest.raises(InputError, match=r"Another ComfyUI is making \S+home/python"):
        other.make()
    other.cancel()
    assert other.progress().state == "absent"
    wait_until(lambda: "some-package" in own.progress().line, within_s=300)
    assert Path(own.python).exists()
    own.cancel()
    other.make()
    assert other.progress().state == "making"
    other.cancel()


def test_one_that_is_there_is_not_made_again(
    tmp_path: Path, own: OwnPython, requirements: Path
) -> None:
    """Another server may have made it, and its ranks may run in it."""
    requirements.write_text("# nothing\n")
    other = OwnPython(tmp_path / "home" / "python", [requirements])
    own.make()
    wait_until(lambda: ended(own), within_s=300)
    made = Path(own.python).lstat()
    for one in (own, other):
        one.make()
        assert one.progress().state == "ready"
        one.cancel()
    assert Path(own.python).lstat() == made
