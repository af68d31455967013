"""What ranks send one another in 8 bits, with ``precision="fast"``: half of a link's bytes.

The sums over a tensor-parallel group that follow row-parallel linears go in two steps. Each rank
sends every other one its codes (``block_codes``) of that one's share of the blocks; it sums what it
got, in fp32, and sends the sum's codes to all. So every rank has the same bits, and each number was
rounded twice. What attention exchanges within a sequence group goes in codes, too, but for a rank's
own part. All else is as ``collectives`` has it, and so is what is computed once a generation.
"""

import functools
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed import parallel_state

from . import block_codes, collectives
from .block_codes import num_blocks, segment_bytes
from .epilogue import Product
from .products import multiply

logger = logging.getLogger("tp_runtime.gpu.eight_bit")


class EightBitCollectives:
    """``models.forward.Collectives`` of this rank's groups, rounding while ``during`` runs.

    On GPUs that NVLink connects, it rounds nothing: there it would cost more than it saves.
    """

    def __init__(self, device: torch.device, fast: bool) -> None:
        """``fast``: with kernels of our own, which GPUs have."""
        on_gpu = device.type == "cuda"
        tp_group = parallel_state.get_tp_group()
        self._codec: ModuleType = block_codes
        if fast:
            from . import block_kernels  # here, since without a GPU there may be no Triton

            self._codec = block_kernels
        self._rounds_sums = tp_group.world_size > 1 and not (on_gpu and collectives.nvlink())
        self._rounds_heads = collectives.sequence_size() > 1 and not (
            on_gpu and collectives.nvlink_of_sharers()
        )
        self._running = False
        if not self.rounds and dist.get_rank() == 0:
            alone = tp_group.world_size == collectives.sequence_size() == 1
            why = "no two GPUs share an evaluation" if alone else "NVLink connects the GPUs"
            logger.info("precision=fast is the same as exact here: %s", why)

    @property
    def rounds(self) -> bool:
        """Whether anything is sent in 8 bits."""
        return self._rounds_sums or self._rounds_heads

    def during(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with 8 bits on the links while it runs, or is recorded."""

        @functools.wraps(evaluate)
        def run(**inputs: Any) -> Any:
            self._running = True
            try:
                return evaluate(**inputs)
            finally:
                self._running = False

        return run

    gather = staticmethod(collectives.gather)
    add_up = staticmethod(collectives.add_up)
    sequence_size = staticmethod(collectives.sequence_size)
    sequence_rank = staticmethod(collectives.sequence_rank)
    exchange = staticmethod(collectives.exchange)
    exchanges_beside = staticmethod(collectives.exchanges_beside)

    def summed(self, products: Sequence[Product]) -> list[torch.Tensor]:
        """See ``models.forward.Collectives``: the sums of all products travel together."""
        if not (self._running and self._rounds_sums):
            return collectives.summed(products)
        parts = []
        for linear, x in products:
            bias = linear.bias if linear.tp_rank == 0 else None  # added once
            parts.append(multiply(linear, x, bias))
        group = parallel_state.get_tp_group()
        counts = [num_blocks(part.numel()) for part in parts]
        firsts = list(itertools.accumulate(counts, initial=0))
        size = segment_bytes(firsts[-1], group.world_size)
        # What no block fills is sent as it is there, and read by nobody.
        sent = torch.empty(group.world_size, size, dtype=torch.uint8, device=parts[0].device)
        for part, first in zip(parts, firsts, strict=False):
            self._codec.encode(part, sent, first)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group.device_group)
        mine = sent[group.rank_in_group]
        self._codec.add_up(received, mine)
        summed = group.all_gather(mine, 0).view_as(sent)
        for part, first in zip(parts, firsts, strict=False):
            self._codec.decode(summed, part, first)
        return parts

    def turns(self, num_bytes: int) -> int:
        """See ``models.token_shares.SequenceGroup``; of numbers in bf16, codes are half as long."""
        return collectives.turns(num_bytes // (2 if self._running and self._rounds_heads else 1))

    def begin_exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]
    ) -> Callable[[], list[torch.Tensor]]:
        """See ``models.token_shares.SequenceGroup``."""
        if not (self._running and self._rounds_heads):
            return collectives.begin_exchange(parts, shapes)
        group = parallel_state.get_pcp_group()
        own = group.rank_in_group
        given = [0 if rank == own else part.numel() for rank, part in enumerate(parts)]
        taken = [0 if rank == own else math.prod(shape) for rank, shape in enumerate(shapes)]
        sizes = [[segment_bytes(num_blocks(size)) for size in of] for of in (given, taken)]
        sent = torch.empty(sum(sizes[0]), dtype=torch.uint8, device=parts[0].device)
        for part, segment in zip(parts, sent.split(sizes[0]), strict=True):
            if segment.numel():
                self._codec.encode(part.contiguous(), segment[None])
        received, wait = collectives.begin_all_to_all(sent, *sizes)

        def arrived() -> list[torch.Tensor]:
            wait()
            found = []
            for rank, segment in enumerate(received.split(sizes[1])):
                if rank == own:
                    found.append(parts[own])
                    continue
                found.append(parts[own].new_empty(shapes[rank]))
                if segment.numel():
                    self._codec.decode(segment[None], found[-1])
            return found

        return arrived
