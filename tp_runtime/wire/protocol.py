"""The messages between the engine and the ranks, as plain data.

A frame is one msgpack map with the protocol's version. The engine sends every request to every
rank; every rank answers each request with exactly one ``Done`` or ``Failed``, after any number
of ``Progress``. ``docs/protocol.md`` shows the sequences; change both together with VERSION.
"""

from typing import Any

import msgspec

from ..config import ModelPatchSpec, ModelSpec
from ..errors import ProtocolError

VERSION = 13
MAX_FRAME_BYTES = 16 * 2**20  # a frame holds no tensor data, only references to it: but a Piece
PIECE_BYTES = 2**20  # at most, of a Piece
_TENSOR_EXT = 1


class TensorRef(msgspec.Struct, frozen=True, array_like=True):
    """A tensor in the exchange memory, or one that the ranks hold already.

    ``key`` 0: used once. Otherwise the ranks hold the tensor under this key until it is dropped;
    ``offset`` -1 says that they do so already and nothing is in the exchange memory.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: int
    key: int = 0


class WeightPatch(msgspec.Struct, frozen=True, array_like=True):
    """One change of a weight, as ComfyUI's LoRA nodes describe it.

    ``kind``: ``"diff"``, ``"set"`` or the name of one of ComfyUI's weight adapters, and
    ``factors`` what it consists of: tensors (in a message, their ``TensorRef``), numbers, None.
    ``offset`` (axis, start, length): the part of the weight that is changed. ``function``: the
    name of what is done to the difference, or None.
    """

    kind: str
    factors: tuple[Any, ...]
    strength: float
    strength_model: float = 1.0
    offset: tuple[int, int, int] | None = None
    function: str | None = None


class PatchedWeight(msgspec.Struct, frozen=True, array_like=True):
    """All changes of one weight. After each of the stages the weight is rounded to its dtype.

    ``seed``: of the rounding to fp8, which is stochastic; ``by_bytes``: with random bytes.
    ``keeps_scale``: in ComfyUI's first format with scales (``QuantisedWeight.first_format``).
    ``shape``: what the weight becomes, where the patches make it larger.
    """

    seed: int
    stages: tuple[tuple[WeightPatch, ...], ...]
    by_bytes: bool = False
    keeps_scale: bool = False
    shape: tuple[int, ...] | None = None


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


# --- engine to ranks ---------------------------------------------------------------------------


class Load(_Message, frozen=True):
    """Read the shards of a model, unless they are held already.

    ``weight_limit``: bytes of its weights that each device may hold; 0: as many as fit beside
    ``computed_bytes``, less room.
    """

    call: int
    model: str
    spec: ModelSpec
    weight_limit: int = 0
    computed_bytes: int = 0


class LoadModelPatch(_Message, frozen=True):
    """Make room for the shards of a model patch, which ``FillModelPatch`` brings."""

    call: int
    model: str
    spec: ModelPatchSpec


class FillModelPatch(_Message, frozen=True):
    """Some tensors of a model patch, by name: each rank keeps its slices."""

    call: int
    model: str
    tensors: dict[str, TensorRef]
    exchange_bytes: int


class Unload(_Message, frozen=True):
    """Free the shards of a model or of a model patch, and all conditioning that is held.

    Unknown ones are fine. ``drop``: keys of factors that no model's patches use any more.
    """

    call: int
    model: str
    drop: list[int] = []


class Evaluation(msgspec.Struct, frozen=True, array_like=True):
    """One evaluation of the transformer. ``inputs`` are ComfyUI's forward arguments by name.

    Tensors in ``inputs`` are ``TensorRef``; the first rank of the batch group that computes it
    writes the results, one of each latent (of a video, and of its sound), where ``results`` says,
    in that shape and dtype.
    """

    inputs: dict[str, Any]
    results: tuple[TensorRef, ...]


class Evaluate(_Message, frozen=True):
    """Evaluate the transformer: each batch group the evaluation of its number, if there is one.

    Every rank keeps the tensors that are to be held, also for the evaluations of other batch
    groups. ``drop`` names held tensors that will not be used again; ``exchange_bytes`` is the
    present size of the exchange memory.

    ``in_stream_order``: the request comes before its inputs, for which the rank's GPU waits, and
    may come while the one before it is computed. It brings nothing to be held.
    """

    call: int
    model: str
    evaluations: list[Evaluation]
    drop: list[int]
    exchange_bytes: int
    in_stream_order: bool = False


class Hold(_Message, frozen=True):
    """Keep these tensors in the rank's host memory, each under its key, until a ``Patch``."""

    call: int
    tensors: list[TensorRef]
    exchange_bytes: int


class Patch(_Message, frozen=True):
    """Make the model's weights the file's, but for ``weights`` (name in the file → changes).

    The factors are tensors of a ``Hold``; ``drop`` names those that will not be used again.
    """

    call: int
    model: str
    weights: dict[str, PatchedWeight]
    drop: list[int]


class Sleep(_Message, frozen=True):
    """Move shards to the host's memory, and drop all conditioning that is held.

    Nothing is done about shards that are there already.
    """

    call: int
    model: str


class Wake(_Message, frozen=True):
    """Move shards back to the device. Nothing is done if they are there."""

    call: int
    model: str


class Report(_Message, frozen=True):
    """Tell what the rank is and holds; with ``digests``, for tests, also a hash of every model's
    weights.
    """

    call: int
    digests: bool = False


class MeasureLink(_Message, frozen=True):
    """Tell how long sums and exchanges of all ranks take, and copies from the host."""

    call: int


class Close(_Message, frozen=True):
    """End the rank's process in an orderly way. Not answered."""

    call: int = 0


# --- both ways, for a rank on another host -----------------------------------------------------


class Piece(_Message, frozen=True):
    """What belongs at ``offset`` of the exchange memory, for a side that does not share it.

    To a rank: part of the next request's tensors. From a rank: part of the result, before its
    ``Done``. Not answered.
    """

    offset: int
    data: memoryview


Request = (
    Load
    | LoadModelPatch
    | FillModelPatch
    | Unload
    | Evaluate
    | Hold
    | Patch
    | Sleep
    | Wake
    | Report
    | MeasureLink
    | Close
    | Piece
)


# --- ranks to engine ---------------------------------------------------------------------------


class Ready(_Message, frozen=True):
    """First message of a rank: the group is up, as this rank sees it."""

    rank: int
    tp_world_size: int
    device: str
    versions: dict[str, str]


class Progress(_Message, frozen=True):
    """``done`` of ``total`` bytes are read."""

    call: int
    done: int
    total: int


class Done(_Message, frozen=True):
    """The request was carried out. ``value`` depends on the request."""

    call: int
    value: Any = None


class Failed(_Message, frozen=True):
    """The request was not carried out.

    ``recoverable``: the rank checked the request and refused it before taking part in any
    collective, as every other rank does; the group is unharmed. Otherwise the rank is ending and
    ``call`` means nothing. ``time_s``: when, on the machine's monotonic clock; the first rank
    that fails makes others fail.
    """

    call: int
    recoverable: bool
    kind: str
    message: str
    traceback: str
    time_s: float


Reply = Ready | Progress | Done | Failed | Piece


# --- coding ------------------------------------------------------------------------------------


class _Frame(msgspec.Struct, frozen=True):
    version: int
    body: msgspec.Raw


def _decode_ref(code: int, data: memoryview) -> TensorRef:
    if code != _TENSOR_EXT:
        raise ProtocolError(f"Unknown extension {code} in a frame.")
    return msgspec.msgpack.decode(data, type=TensorRef)


_encoder = msgspec.msgpack.Encoder()
_frame_decoder = msgspec.msgpack.Decoder(_Frame)
_request_decoder = msgspec.msgpack.Decoder(Request, ext_hook=_decode_ref)
_reply_decoder = msgspec.msgpack.Decoder(Reply, ext_hook=_decode_ref)


def pack_inputs(inputs: Any) -> Any:
    """Replace every TensorRef in a tree of plain data by its wire form (an extension type)."""
    if isinstance(inputs, TensorRef):
        return msgspec.msgpack.Ext(_TENSOR_EXT, msgspec.msgpack.encode(inputs))
    if isinstance(inputs, dict):
        return {key: pack_inputs(value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [pack_inputs(value) for value in inputs]
    return inputs


def encode(message: Request | Reply) -> bytes:
    """One frame.

    Raises:
        ProtocolError: the message holds something other than plain data, or is too long.
    """
    try:
        frame = _encoder.encode({"version": VERSION, "body": msgspec.Raw(_encoder.encode(message))})
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"A message cannot be encoded: {error}") from error
    if len(frame) > MAX_FRAME_BYTES:
        raise ProtocolError(f"A message of {len(frame)} bytes; at most {MAX_FRAME_BYTES} fit.")
    return frame


def _decode(frame: bytes, decoder: Any) -> Any:
    try:
        outer = _frame_decoder.decode(frame)
        if outer.version != VERSION:
            raise ProtocolError(
                f"A frame of protocol version {outer.version}; this side speaks {VERSION}. "
                "Both sides must come from the same release."
            )
        return decoder.decode(outer.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise ProtocolError(f"A malformed frame of {len(frame)} bytes: {error}") from error


def decode_request(frame: bytes) -> Request:
    """The request in a frame. Raises ProtocolError."""
    request: Request = _decode(frame, _request_decoder)
    return request


def decode_reply(frame: bytes) -> Reply:
    """The reply in a frame. Raises ProtocolError."""
    reply: Reply = _decode(frame, _reply_decoder)
    return reply
