"""The rows of what Wan Animate has beside the blocks: poses, and faces that move."""

from collections.abc import Iterator
from itertools import pairwise

from ...sharding.parts import Shape
from ...sharding.plan import Column, MergedColumn, Row, Split
from ...sharding.table import IMAGE, PROMPT, Linear, Stack, TableRow, Tensor

PATCH = (1, 2, 2)
# What ComfyUI's class does not read from a file (0.3.75, comfy/ldm/wan/model_animate.py).
POSE_CHANNELS = 16
FACE_SIDE = 512  # pixels of a picture of a face
MOTION, DIRECTIONS = 512, 20  # features of a face's motion, and directions that it is made of
FACE_HEADS, FACE_WIDTH = 4, 1024  # tokens of a face, and their width before the model's
BLOCKS_PER_FACES = 5  # blocks from one look at the faces to the next
# Of pictures, after each halving of their sides.
WIDTHS = (32, 64, 128, 256, 512, 512, 512, 512)
_CONVS = "motion_encoder.enc.net_app.convs"


def outside(dim: int) -> tuple[TableRow, ...]:
    """What runs once a generation, and every rank has all of: 0.2 % of the published model.

    All are convolutions and small layers with scales of their own but the last.
    """
    pose, faces, motion = "pose_patch_embedding", "face_encoder", "motion_encoder"
    wide, narrow = FACE_HEADS * FACE_WIDTH, FACE_WIDTH
    convolutions = ("conv1_local", wide, MOTION), ("conv2", narrow, narrow)
    rows: list[TableRow] = [
        Tensor(f"{pose}.weight", "", (dim, POSE_CHANNELS, *PATCH)),
        Tensor(f"{pose}.bias", "", (dim,)),
        Tensor(f"{faces}.padding_tokens", "", (1, 1, 1, dim)),
    ]
    for name, outputs, inputs in (*convolutions, ("conv3", narrow, narrow)):
        ours, file = f"{faces}.{name}", f"{faces}.{name}.conv"
        rows.append(Tensor(f"{ours}.weight", f"{file}.weight", (outputs, inputs, 3)))
        rows.append(Tensor(f"{ours}.bias", f"{file}.bias", (outputs,)))
    rows += [Tensor(f"{motion}.{ours}", file, shape) for ours, file, shape in _of_motion()]
    return (*rows, Linear(f"{faces}.out_proj", "", Column(gather=True), narrow, dim))


def faces(heads: Split, head_dim: int, num_blocks: int) -> Stack:
    """The blocks that look at faces, split by heads as the model's own."""
    dim, units = heads.full, (head_dim, head_dim)
    rows: tuple[TableRow, ...] = (
        Linear("to_q", "linear1_q", Column((heads,)), dim, dim, IMAGE),
        Linear("{to_k,to_v}", "linear1_kv", MergedColumn("to_kv", units), dim, (dim, dim), PROMPT),
        Linear("to_out", "linear2", Row((heads,)), dim, dim, IMAGE),
        Tensor("norm_{q,k}.weight", "{q,k}_norm.weight", (head_dim,)),
    )
    # Their attention, of a frame's tokens to a face's five, is too little to be counted.
    count = -(-num_blocks // BLOCKS_PER_FACES)
    return Stack("face_adapter", "face_adapter.fuser_blocks", count, rows)


def kernels() -> dict[str, Shape]:
    """What pictures are blurred with: stored in files, and the same in all of them."""
    return {
        f"{_CONVS}.{number}.{name}.0.kernel": (4, 4)
        for number in range(1, len(WIDTHS))
        for name in ("conv2", "skip")
    }


def _of_motion() -> Iterator[tuple[str, str, Shape]]:
    """Name in the module, and in the file, and shape of the tensors of the motion encoder."""

    def layer(
        ours: str, file: str, shape: Shape, activation: str = ""
    ) -> Iterator[tuple[str, str, Shape]]:
        yield f"{ours}.weight", f"{file}.weight", shape
        if activation:
            yield f"{ours}.bias", f"{activation}.bias", (1, shape[0], 1, 1)

    first, last = WIDTHS[0], WIDTHS[-1]
    yield from layer("first", f"{_CONVS}.0.0", (first, 3, 1, 1), f"{_CONVS}.0.1")
    for number, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
        ours, file = f"blocks.{number - 1}", f"{_CONVS}.{number}"
        same, halved = (inputs, inputs, 3, 3), (outputs, inputs, 3, 3)
        yield from layer(f"{ours}.same", f"{file}.conv1.0", same, f"{file}.conv1.1")
        yield from layer(f"{ours}.halved", f"{file}.conv2.1", halved, f"{file}.conv2.2")
        yield from layer(f"{ours}.skip", f"{file}.skip.1", (outputs, inputs, 1, 1))
    yield from layer("last", f"{_CONVS}.{len(WIDTHS)}", (MOTION, last, 4, 4))
    for number in range(5):
        outputs = DIRECTIONS if number == 4 else MOTION
        file = f"motion_encoder.enc.fc.{number}"
        yield f"linears.{number}.weight", f"{file}.weight", (outputs, MOTION)
        yield f"linears.{number}.bias", f"{file}.bias", (outputs,)
    yield "directions", "motion_encoder.dec.direction.weight", (MOTION, DIRECTIONS)
