"""Whether a layout's weights fit on its GPUs, what is read from the host's memory if not, and what
else needs room there.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .. import machine
from ..config import ROOM_BYTES, Layout, fitting_weights, gpu_memory
from ..errors import SizeError
from ..models.family import Sizes
from ..sharding.block_costs import BlockCosts
from ..sharding.streaming import layers_of, streaming_plan
from ..sharding.table import PROMPT
from .cost_model import BYTES
from .gpus import Gpu
from .step_history import Workload

# What a rank computes with at once: so many tensors of its tokens, as wide as a block's tokens and
# its widest linear together, and what is as large for any number of tokens.
LIVE_TENSORS, LIVE_BYTES = 3.3, 2**28
# Bytes for each number of a weight that a LoRA changes: it, and the change, in fp32.
PATCHED_BYTES = 2 * 4
HOST_SHARE = 0.5  # of the host's memory may be streamed from; the rest is the text encoder's


@dataclass(frozen=True)
class Room:
    """Bytes of each GPU of a layout, the smallest one: of its ``share`` of the weights it may hold
    ``limit``, which leaves ``beside`` for what is computed.

    ``streamed``: what it reads from the host's memory in every evaluation; None: even with all
    blocks there, the rest is more than ``limit``. ``in_host``: what all of them have there.
    """

    share: int
    limit: int
    beside: int
    streamed: int | None
    in_host: int

    @classmethod
    def on(
        cls,
        gpus: Iterable[Gpu],
        sizes: Sizes,
        weight_bytes: int,
        layout: Layout,
        native: Workload,
    ) -> "Room":
        """For a model of ``weight_bytes``, as the ranks will have it but for padding.

        ``native``: what the model is made for, which has room beside them.
        """
        memory = min(gpu.memory for gpu in gpus)
        limit = gpu_memory() or fitting_weights(memory, bytes_beside(sizes, native, layout))
        share = math.ceil(weight_bytes / layout.tp_size)
        try:
            streamed = streamed_bytes("The model", sizes, layout.tp_size, weight_bytes, limit)
        except SizeError:
            streamed = None
        in_host = max(0, share - limit) * layout.tp_size  # one copy of each part
        return cls(share, limit, memory - limit - ROOM_BYTES, streamed, in_host)

    @property
    def fits(self) -> bool:
        """Whether nothing is streamed."""
        return self.share <= self.limit

    @property
    def can_stream(self) -> bool:
        """Whether what does not fit can be streamed on this machine."""
        return self.streamed is not None and self.in_host <= HOST_SHARE * machine.memory().total


def streamed_bytes(
    label: str, sizes: Sizes, tp_size: int, weight_bytes: int, limit: int | None
) -> int:
    """What each rank reads from the host's memory in every evaluation; 0: nothing.

    ``weight_bytes``: of the whole model; ``limit``: those that a GPU may hold, None for all.

    Raises:
        SizeError: what cannot be streamed takes more; ``label`` is the model's.
    """
    layers = layers_of(sizes.table, tp_size, weight_bytes / sizes.table.num_elements)
    plan = streaming_plan(label, layers, math.ceil(weight_bytes / tp_size), limit)
    paths = frozenset(plan.paths if plan else ())
    return sum(one.nbytes for one in layers if one.path in paths and one.over != PROMPT)


def live_bytes(sizes: Sizes, workload: Workload, layout: Layout) -> float:
    """What each rank needs beside its weights for a step, to within a third or so."""
    geometry = sizes.geometry
    image = geometry.image_tokens(workload.latent_shape[1:])
    batch = -(-workload.batch // layout.batch_groups)
    blocks = sizes.table.block_costs(geometry.padded(workload.text_tokens), geometry.padded(image))
    numbers = max(_live_numbers(block, layout.tp_size) for block in blocks)
    return LIVE_BYTES + LIVE_TENSORS * BYTES * batch * numbers / layout.sequence_size


def bytes_beside(sizes: Sizes, workload: Workload, layout: Layout) -> float:
    """The room that each rank's weights leave: for such a step, and for a LoRA on the widest of
    them, which every rank computes whole.
    """
    widest = max(map(math.prod, sizes.table.file_tensors.values()))
    return max(live_bytes(sizes, workload, layout), LIVE_BYTES + PATCHED_BYTES * widest)


def _live_numbers(block: BlockCosts, tp_size: int) -> int:
    """Of all tokens of an item: what passes through the block, and what its widest linears give."""
    widest: dict[str, int] = {}
    for linear in block.linears:
        given = linear.rows * linear.local(tp_size)[1]
        widest[linear.over] = max(widest.get(linear.over, 0), given)
    return block.tokens * block.width + sum(widest.values())
