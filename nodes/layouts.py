"""The `layout` input: how the GPUs that `gpu_count` says share the work."""

from ..tp_runtime.client import MAX_TP_SIZE, CheckpointInfo, Layout
from .placement import AUTO
from .schema import check_choice

PLAIN = "tp"
EXPLICIT = tuple(
    str(Layout(tp_size, batch_groups, sequence_size))
    for sequence_size in range(1, MAX_TP_SIZE + 1)
    for tp_size in range(1, MAX_TP_SIZE // sequence_size + 1)
    for batch_groups in range(1, MAX_TP_SIZE // (sequence_size * tp_size) + 1)
)
LAYOUTS = (AUTO, PLAIN, *EXPLICIT)


def possible_layouts(
    layout: str, gpu_count: int | None, info: CheckpointInfo, num_gpus: int
) -> list[Layout]:
    """What the two inputs leave to choose from, the default first.

    `gpu_count`: None for 'auto', which means at most `num_gpus`.

    Raises:
        SizeError: the model cannot be split that way.
        ValueError: it is none of `LAYOUTS`, or contradicts `gpu_count`.
    """
    check_choice("layout", layout, LAYOUTS)
    if layout in EXPLICIT:
        return [_explicit(layout, gpu_count, info)]
    most = gpu_count or num_gpus
    sizes = info.valid_tp_sizes(limit=min(most, MAX_TP_SIZE))
    shares_tokens = layout == AUTO and info.family.shares_tokens
    every = [
        Layout(tp_size, batch_groups, sequence_size)
        for sequence_size in (range(1, MAX_TP_SIZE + 1) if shares_tokens else (1,))
        for tp_size in sizes
        for batch_groups in (range(1, most + 1) if layout == AUTO else (1,))
        if tp_size * sequence_size <= MAX_TP_SIZE
    ]
    every = [
        found
        for found in every
        if found.num_gpus == gpu_count or (gpu_count is None and found.num_gpus <= most)
    ]
    # Of one latent, batch groups have one: a default without them.
    defaults = [found for found in every if found.batch_groups == 1]
    if not defaults:
        assert gpu_count is not None, "one GPU is possible"
        info.check_tp_size(gpu_count)
    default = max(defaults, key=lambda found: (found.sequence_size == 1, found.tp_size))
    return [default, *(found for found in every if found != default)]


def _explicit(layout: str, gpu_count: int | None, info: CheckpointInfo) -> Layout:
    chosen = Layout.parse(layout)
    if gpu_count is not None and gpu_count != chosen.num_gpus:
        raise ValueError(
            f"layout={layout} takes {chosen.num_gpus} GPUs (the product of its numbers), but "
            f"gpu_count is {gpu_count}. Set gpu_count to {chosen.num_gpus} or 'auto', or layout to "
            "'auto'."
        )
    info.check_layout(chosen)
    return chosen
