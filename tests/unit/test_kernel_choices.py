"""Which kernel was fastest: what one rank keeps, every other one takes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tp_runtime.gpu import kernel_choices
from tp_runtime.gpu.kernel_choices import KernelChoices


def test_the_first_choice_stands(tmp_path: Path) -> None:
    choices, others = (KernelChoices(tmp_path / "choices.jsonl") for _ in range(2))
    assert choices.get("a shape") is None
    assert choices.keep("a shape", "cudnn") == "cudnn"
    assert others.keep("a shape", "flash3") == "cudnn"
    assert others.get("a shape") == "cudnn"
    assert others.get("another shape") is None


def test_ranks_that_choose_at_once_agree(tmp_path: Path) -> None:
    names = ["cudnn", "flash3"] * 8
    with ThreadPoolExecutor(len(names)) as ranks:
        kept = ranks.map(
            lambda name: KernelChoices(tmp_path / "choices.jsonl").keep("a shape", name), names
        )
        assert len(set(kept)) == 1


@pytest.mark.parametrize("content", [b"", b"\0\xff\n", b'["a shape"', b"[1, 2]\n{}\nnull\n"])
def test_a_file_of_any_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "choices.jsonl").write_bytes(content + b"\n")
    choices = KernelChoices(tmp_path / "choices.jsonl")
    assert choices.get("a shape") is None
    assert choices.keep("a shape", "cudnn") == "cudnn"
    assert choices.get("a shape") == "cudnn"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    choices = KernelChoices(tmp_path / "absent" / "choices.jsonl")
    assert choices.keep("a shape", "cudnn") == "cudnn"


def test_a_long_file_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choices, "LIMIT_BYTES", 100)
    choices = KernelChoices(tmp_path / "choices.jsonl")
    for index in range(100):
        choices.keep(f"shape {index}", "cudnn")
    assert (tmp_path / "choices.jsonl").stat().st_size < 200
    assert choices.get("shape 99") == "cudnn"
