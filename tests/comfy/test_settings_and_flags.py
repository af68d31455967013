"""ComfyUI's settings file with any content, and its flags for dtypes: settings, or one clear error.

The pack's code and ComfyUI's are real, in this process; no server, no ranks.
"""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.fuzz import examples
from support.pack import pack_module
from tp_runtime.client import CheckpointError, GroupConfig, GroupStartError

pytestmark = pytest.mark.comfy

PYTHON, DEVICES = "TensorParallel.Runtime.Python", "TensorParallel.Runtime.Devices"


@pytest.fixture(scope="module")
def settings() -> Iterator[ModuleType]:
    with pack_module("nodes.settings") as module:
        yield module


@pytest.fixture
def file(settings: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's settings file."""
    folder = tmp_path / "default"
    folder.mkdir(exist_ok=True)
    paths = SimpleNamespace(
        get_user_directory=lambda: str(tmp_path),
        get_input_directory=lambda: str(tmp_path / "input"),
        get_output_directory=lambda: str(tmp_path / "output"),
        get_temp_directory=lambda: str(tmp_path / "temp"),
    )
    monkeypatch.setattr(settings, "folder_paths", paths)
    monkeypatch.setattr(settings, "_WRITING_S", 0.0)
    return folder / "comfy.settings.json"


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b"1", b'"text"', b"{", b"\xff\xfe", b'{"a": ' * 100_000, b"", b"[" * 10**6],
)
def test_a_file_that_is_no_settings(settings: ModuleType, file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for read in (settings.python_setting, settings.devices_setting):
        with pytest.raises(GroupStartError, match=r"comfy\.settings\.json cannot be read \(.+\)"):
            read()


@pytest.mark.parametrize("half", [b"", b'{"TensorParallel.Runtime.Devices": '])
def test_a_file_that_is_being_written(
    settings: ModuleType, file: Path, monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    """ComfyUI empties the file first, and a busy disk takes its time."""
    monkeypatch.setattr(settings, "_WRITING_S", 60.0)
    file.write_bytes(half)
    written = threading.Timer(0.5, file.write_text, [json.dumps({DEVICES: "0,1"})])
    written.start()
    assert settings.devices_setting() == "0,1"
    written.join()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
)
paths = st.sampled_from(["~nobody/python3", "/python\0", "/" + "x" * 5000, "python3", "/dev/null"])


@examples(100)
@given(st.dictionaries(st.sampled_from([PYTHON, DEVICES, "other"]), anything | paths))
def test_any_settings(settings: ModuleType, file: Path, stored: dict[str, Any]) -> None:
    """A setting is what it is as text, none, or refused by name."""
    file.write_text(json.dumps(stored))
    assert isinstance(settings.devices_setting(), str)
    if str(stored.get(PYTHON) or "").strip():
        with pytest.raises(GroupStartError, match="which is no path of a Python"):
            settings.python_setting()
    else:
        assert settings.python_setting() is None


@pytest.mark.parametrize(
    ("place", "allowed"),
    [
        ("tp-runtime/bin/python", True),
        ("tp-runtime/bin/python3.12", True),
        ("tp-runtime/bin/python_x.png", False),
        ("comfy/input/python3", False),
        ("comfy/python3", False),  # below ComfyUI's folder of its users
    ],
)
def test_only_a_python_that_nobody_has_sent(
    settings: ModuleType,
    file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    place: str,
    allowed: bool,
) -> None:
    """Some file systems take every file for a program, and ComfyUI takes uploads of any name."""
    users = file.parent.parent
    path = (users if place.startswith("comfy/") else tmp_path_factory.mktemp("home")) / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    file.write_text(json.dumps({PYTHON: str(path)}))
    if allowed:
        assert settings.python_setting() == str(path)
        return
    with pytest.raises(GroupStartError, match="outside of the folders that ComfyUI writes to"):
        settings.python_setting()


@pytest.mark.parametrize("stored", [None, "", "auto", "always", "when used"])
def test_when_to_prepare(settings: ModuleType, file: Path, stored: str | None) -> None:
    file.write_text(json.dumps({"TensorParallel.Runtime.Prepare": stored}))
    assert settings.prepare_setting() == (stored or "auto")


@pytest.mark.parametrize("stored", ["never", True, ["auto"], {"auto": 1}, 3.5])
def test_another_time_to_prepare_is_refused(
    settings: ModuleType, file: Path, stored: object
) -> None:
    file.write_text(json.dumps({"TensorParallel.Runtime.Prepare": stored}))
    with pytest.raises(GroupStartError, match="choose one of auto, always, when used"):
        settings.prepare_setting()


@pytest.mark.parametrize("flag", ["fp8_e8m0fnu_unet"])
def test_a_flag_for_a_dtype_that_we_have_not(
    tiny_z_image: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    with pack_module("nodes.model") as models:
        from comfy.cli_args import args

        monkeypatch.setattr(args, flag, True)
        group = GroupConfig(1, "cpu")
        with pytest.raises(CheckpointError, match=r"weights in torch\.float8_e8m0fnu.*Allowed: "):
            models.load_model(str(tiny_z_image), None, group, models.Placement(), "auto")
