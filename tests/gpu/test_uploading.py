"""Slices of a file on their way to a GPU: larger than a buffer, strided, of another dtype."""

import pytest
import torch

from tp_runtime.gpu.speeds import host_times
from tp_runtime.rank.uploading import BUFFER_BYTES, Uploads

pytestmark = pytest.mark.gpu

ROWS, COLUMNS = 3 * BUFFER_BYTES // 4096 + 5, 1024


def test_what_arrives() -> None:
    source = torch.randn(ROWS, COLUMNS)
    sources = [
        source,
        source[:, 100:612],
        source[7:9],
        source[0],
        source[0, 0],
        source[:0],
        source.bfloat16(),
    ]
    targets = [torch.full(one.shape, torch.nan, device="cuda") for one in sources]
    padded = torch.full((ROWS, COLUMNS), torch.nan, device="cuda")
    padded.zero_()
    with Uploads(torch.device("cuda", 0), num_ranks=1) as uploads:
        for one, target in zip(sources, targets, strict=True):
            uploads.copy(one, target)
        uploads.copy(source[:, :512], padded.narrow(1, 256, 512))
    for one, target in zip(sources, targets, strict=True):
        assert torch.equal(target.cpu(), one.float())
    assert torch.equal(padded[:, 256:768].cpu(), source[:, :512])
    assert not padded[:, :256].any()
    assert not padded[:, 768:].any()


def test_an_error_comes_out() -> None:
    source, target = torch.zeros(4, 4), torch.zeros(4, 5, device="cuda")
    with pytest.raises(RuntimeError), Uploads(torch.device("cuda", 0), num_ranks=1) as uploads:
        uploads.copy(source, target)


def test_how_fast_the_host_is_read() -> None:
    """From page-locked memory, which is given back: as often as one likes."""
    for _ in range(3):
        found = host_times(torch.device("cuda", 0))
        assert 1e9 < found["bytes"] / found["copy_s"] < 1e12
