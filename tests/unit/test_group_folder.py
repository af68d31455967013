"""Folders of groups: private, found again after a crash, and never taken from a live group."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from support.paths import REPOSITORY
from tp_runtime.client import GroupStartError
from tp_runtime.client.launch.group_folder import KEPT_FOLDERS, GroupFolder, _is_locked


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TP_RUNTIME_HOME", str(tmp_path))
    return tmp_path / "groups"


def leave(groups: Path, count: int) -> list[Path]:
    """Folders as dead processes leave them, oldest first; one has the number of a live process."""
    groups.mkdir(parents=True, exist_ok=True)
    folders = [groups / f"{os.getpid() if i == 0 else 10**7 + i}-left{i}" for i in range(count)]
    for age, folder in zip(range(count, 0, -1), folders, strict=True):
        folder.mkdir()
        (folder / "rank0.log").touch()
        os.utime(folder, (10**9 - age, 10**9 - age))
    return folders


def test_only_the_owner_may_look(groups: Path) -> None:
    folder = GroupFolder.create()
    assert folder.path.parent == groups
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.release(keep=False)


def test_release_removes_or_keeps(groups: Path) -> None:
    for keep in (False, True):
        folder = GroupFolder.create()
        folder.release(keep)
        folder.release(keep)
        assert folder.path.exists() == keep


def test_the_newest_that_were_left_are_kept(groups: Path) -> None:
    left = leave(groups, KEPT_FOLDERS + 3)
    live = GroupFolder.create()
    assert [folder.exists() for folder in left] == [False] * 3 + [True] * KEPT_FOLDERS
    live.release(keep=False)


def test_a_live_groups_folder_stays(groups: Path) -> None:
    live = GroupFolder.create()
    os.utime(live.path, (1, 1))  # older than any other
    leave(groups, KEPT_FOLDERS + 1)
    GroupFolder.create().release(keep=False)
    assert live.path.exists()
    live.release(keep=True)
    leave_more = groups / "1-newer"
    leave_more.mkdir()
    GroupFolder.create().release(keep=False)
    assert not live.path.exists(), "now it may go"


def test_another_process_keeps_its_folder_until_it_is_killed(groups: Path) -> None:
    code = (
        "import sys, time; from tp_runtime.client.launch.group_folder import GroupFolder; "
        "folder = GroupFolder.create(); print(folder.path, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        os.utime(theirs, (1, 1))
        leave(groups, KEPT_FOLDERS + 1)
        GroupFolder.create().release(keep=False)
        assert theirs.exists()
        owner.send_signal(signal.SIGKILL)
    (groups / "1-newer").mkdir()
    GroupFolder.create().release(keep=False)
    assert not theirs.exists()


def test_starting_together(groups: Path) -> None:
    leave(groups, 40)
    folders: list[GroupFolder] = []
    threads = [
        threading.Thread(target=lambda: folders.append(GroupFolder.create())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder.path for folder in folders if folder.path.exists()}) == 8
    for folder in folders:
        folder.release(keep=False)


def test_a_home_as_people_write_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.chdir(tmp_path)
    for written, meant in (("~/x", "me/x"), ("relative", "relative")):
        monkeypatch.setenv("TP_RUNTIME_HOME", written)
        folder = GroupFolder.create()
        assert folder.path.parent == tmp_path / meant / "groups"
        folder.release(keep=False)
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_no_place_for_logs_says_where_to_find_one(
    groups: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(GroupStartError, match=f"{os.strerror(error)}.*Set TP_RUNTIME_HOME to a"):
        GroupFolder.create()
    assert not list(groups.iterdir())


def test_a_sweep_that_looks_at_a_new_folder(groups: Path) -> None:
    """It holds the lock meanwhile; the folder must be locked afterwards all the same."""
    groups.mkdir(parents=True, exist_ok=True)
    folder = groups / "1-new"
    folder.mkdir()
    looking = os.open(folder, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_EX)
    threading.Timer(0.2, os.close, (looking,)).start()
    live = GroupFolder(folder)
    assert _is_locked(folder)
    live.release(keep=False)
