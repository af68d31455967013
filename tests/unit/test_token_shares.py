"""What ranks that share tokens do with a mask over all of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tp_runtime.models.token_shares import TokenShares

# Two ranks, of which this is the first.
GROUP: Any = SimpleNamespace(sequence_size=lambda: 2, sequence_rank=lambda: 0)


class Devices(TorchDispatchMode):
    """Where the tensors are that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found.add(result.device.type)
        return result


# Of 3 and 5 tokens: those of the first rank, then those of the second.
ORDER = [0, 1, 3, 4, 5, 2, 6, 7]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_mask_follows_the_tokens(rows: int) -> None:
    mask = torch.arange(rows * 8).view(1, 1, rows, 8)
    found = TokenShares(GROUP, (3, 5)).in_their_order(mask)
    expected = mask[..., ORDER] if rows == 1 else mask[..., ORDER, :][..., ORDER]
    assert found is not None
    assert torch.equal(found, expected)


def test_the_order_of_a_mask_is_made_where_the_mask_is() -> None:
    """A CUDA graph that is recorded refuses a copy from the host."""
    mask = torch.ones(1, 1, 8, 8, device="meta")
    with Devices() as devices:
        TokenShares(GROUP, (3, 5)).in_their_order(mask)
    assert devices.found == {"meta"}
