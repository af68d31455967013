"""What a person is told of a rank that ran out of memory, in torch's words on a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest

from tp_runtime.client import GroupConfig, RankMemoryError, failures
from tp_runtime.wire.protocol import Failed


def error_of(free: str, others: str, held: str) -> str:
    message = (
        "CUDA out of memory. Tried to allocate 72.00 MiB. GPU 1 has a total capacity of 23.53 GiB "
        f"of which {free} is free. {others}Including non-PyTorch memory, this process has {held} "
        "memory in use. Of the allocated memory 4.9 GiB is allocated by PyTorch"
    )
    rank: Any = SimpleNamespace(index=1, place="GPU 1", log_path="/log")
    failed = Failed(3, False, "OutOfMemoryError", message, "", 0.0)
    found = failures.rank_error(GroupConfig(2, "cuda", (0, 1)), rank, failed, "Evaluate")
    assert isinstance(found, RankMemoryError)
    return str(found)


def test_what_another_program_holds() -> None:
    text = error_of("11.06 MiB", "Process 4242 has 18.20 GiB memory in use. ", "5.31 GiB")
    assert "ran out of memory on GPU 1" in text
    assert "72.00 MiB asked for, 5.31 GiB held; other processes" in text
    assert "hold about 18.2 GiB" in text
    assert "'devices' of the loader, or the setting 'GPUs to use'" in text


@pytest.mark.parametrize(("free", "held"), [("11.06 MiB", "23.40 GiB"), ("0 bytes", "23.53 GiB")])
def test_what_the_model_itself_holds(free: str, held: str) -> None:
    text = error_of(free, "", held)
    assert "other processes" not in text
    assert "(TP_RUNTIME_GPU_MEMORY)" in text
