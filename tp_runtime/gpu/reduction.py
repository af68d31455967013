"""Sums a row-parallel linear over the ranks together with what follows it. GPUs only.

Every rank multiplies into a buffer that the others can read (torch's symmetric memory). One kernel
then sums a share of the rows from all ranks, adds the residual, takes the norm, and writes the
rows to every rank: the traffic of an all-reduce, without its passes over memory before and after.
"""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._symmetric_memory as symm_mem
from vllm.distributed import parallel_state

from . import collectives, kernels
from .epilogue import Epilogue, Product
from .products import multiply

logger = logging.getLogger("tp_runtime.gpu.reduction")


@functools.cache
def fused_reduction(device: torch.device) -> "FusedReduction | None":
    """That of this process's group; None where no NVLink connects the GPUs."""
    if collectives.nvlink():
        return FusedReduction(device)
    logger.warning("no NVLink connects the GPUs: sums go through NCCL, and slower")
    return None


@dataclass
class _Buffers:
    """Of ``size`` bytes on every rank: parts of updates, and finished rows."""

    updates: torch.Tensor  # uint8
    targets: torch.Tensor
    update_addresses: torch.Tensor  # (ranks,) int64, on the device
    target_addresses: torch.Tensor
    handle: Any  # of symmetric memory; None on one rank


class FusedReduction:
    """``models.forward.Reduction`` of this rank's group. The ranks must call it in step."""

    def __init__(self, device: torch.device) -> None:
        group = parallel_state.get_tp_group()
        self._group = group.device_group
        # Not ``group.rank``, which counts the ranks of all batch groups.
        self._rank, self._num_ranks = group.rank_in_group, group.world_size
        self._device = device
        # Recorded graphs keep the addresses of the buffers that were current: none is ever freed.
        self._buffers: list[_Buffers] = []

    def __call__(
        self, products: Sequence[Product], tokens: torch.Tensor, epilogue: Epilogue
    ) -> torch.Tensor:
        """The second result of ``join``, in memory that the next call overwrites."""
        buffers = self._of_size(tokens.nbytes)
        update = buffers.updates[: tokens.nbytes].view(tokens.dtype).view_as(tokens)
        start = 0
        for linear, x in products:
            bias = linear.bias if linear.tp_rank == 0 else None  # added once
            multiply(linear, x, bias, out=update[:, start : start + x.shape[1]])
            start += x.shape[1]
        # Of one stream, every token is its text.
        num_text = products[0][1].shape[1]
        self._wait(buffers)  # until every rank's updates are there
        kernels.residual_norm(
            buffers.update_addresses,
            buffers.target_addresses,
            tokens,
            epilogue,
            num_text,
            self._rank,
            self._num_ranks,
        )
        self._wait(buffers)  # until every rank has read our update and written its rows
        return buffers.targets[: tokens.nbytes].view(tokens.dtype).view_as(tokens)

    def _wait(self, buffers: _Buffers) -> None:
        if buffers.handle is not None:
            buffers.handle.barrier(channel=0)

    def _of_size(self, size: int) -> _Buffers:
        if not self._buffers or len(self._buffers[-1].updates) < size:
            # At least twice the last: all that were outgrown take no more room than this one.
            last = len(self._buffers[-1].updates) if self._buffers else 0
            self._buffers.append(self._allocate(max(size, 2 * last)))
        return self._buffers[-1]

    def _allocate(self, size: int) -> _Buffers:
        def addresses(of_ranks: list[int]) -> torch.Tensor:
            return torch.tensor(of_ranks, dtype=torch.int64, device=self._device)

        if self._num_ranks == 1:
            updates, targets = torch.empty(2, size, dtype=torch.uint8, device=self._device)
            of_update, of_target = addresses([updates.data_ptr()]), addresses([targets.data_ptr()])
            return _Buffers(updates, targets, of_update, of_target, None)
        updates = symm_mem.empty(size, dtype=torch.uint8, device=self._device)
        targets = symm_mem.empty(size, dtype=torch.uint8, device=self._device)
        handle, other = (symm_mem.rendezvous(one, self._group) for one in (updates, targets))
        return _Buffers(
            updates, targets, addresses(handle.buffer_ptrs), addresses(other.buffer_ptrs), handle
        )
