"""What follows a row-parallel linear: a residual, then a norm of the sum; as data."""

from typing import Any, Literal, NamedTuple

import torch

# A row-parallel linear and its input (B, L, this rank's features).
Product = tuple[Any, torch.Tensor]


class Epilogue(NamedTuple):
    """The residual that a linear's output (the update) is added to, and the norm of their sum.

    ``gate`` multiplies the update; None: it is added as it is. ``norm``: of the sum, a layer norm,
    an RMS norm, or none; multiplied by ``weight``, plus ``bias``, then by 1 + ``scale``, plus
    ``shift``, each if given. ``update_weight``: the update is RMS-normed with it, and its gate's
    tanh taken (Z-Image). ``limit``: in fp16, sums that overflow are brought back.

    ``num_late``: of the last product's tokens the last so many are a stream of their own here.
    ``streams`` (L,) int64: of one product's tokens, the stream of each.

    ``gate``, ``scale``, ``shift``: (S, B, D), one row for all tokens of an item in each of S
    streams; or, of one stream, (1, B, L, D), a row for each token. ``scale`` and ``shift`` have
    equal strides. ``weight``, ``bias``, ``update_weight``: (D,).
    """

    eps: float
    gate: torch.Tensor | None = None
    norm: Literal["none", "layer", "rms"] = "none"
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    update_weight: torch.Tensor | None = None
    limit: bool = False
    num_late: int = 0
    streams: torch.Tensor | None = None

    def of_stream(self, stream: int) -> "Epilogue":
        """The same of one stream: its rows are (B, 1, D) or (B, L, D)."""

        def rows(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            if self.streams is not None:
                return values[self.streams].transpose(0, 1)
            here = values[stream]
            return here if here.ndim == 3 else here[:, None]

        return self._replace(gate=rows(self.gate), scale=rows(self.scale), shift=rows(self.shift))


def strides(values: torch.Tensor | None) -> tuple[int, int, int]:
    """Of streams, items and tokens; 0 where one row serves all tokens."""
    if values is None:
        return 0, 0, 0
    stream, item, *token = values.stride()[:-1]
    assert values.stride(-1) == 1, "the features of a row lie in order"
    return stream, item, token[0] if token else 0
