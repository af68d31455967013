"""Reads slices of a model file as the parameters of a shard hold them."""

from collections.abc import Collection

import torch

from ..files.checkpoint import CheckpointFile
from ..files.quantised import companion_values
from ..sharding.parts import Part
from ..sharding.quantisation import Quantisation
from .quantised_arithmetic import dequantised, smoothed


class Reader:
    """Reads parts: as the file stores them, or rounded to the dtype that plain weights are held in.

    ComfyUI rounds everything to the weights' dtype but what it holds in fp32 (``exact``, names in
    the file) and quantised weights.
    """

    def __init__(
        self,
        file: CheckpointFile,
        quantisation: Quantisation,
        weight_dtype: torch.dtype,
        exact: Collection[str],
    ) -> None:
        self._file = file
        self._quantisation = quantisation
        self._weight_dtype = weight_dtype
        self._exact = exact
        self._companions = {
            stored: (weight, name)
            for weight in quantisation.weights.values()
            for name, stored in weight.tensors.items()
        }
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def read(self, part: Part) -> torch.Tensor:
        """The part's values."""
        if part.source in self._companions:
            return _slice(self._companion(part.source), part.rows, part.columns)
        layer, _, _ = part.target.rpartition(".")
        if part.source not in self._quantisation.weights:
            data = self._file.read(part.source, part.rows, part.columns)
        elif layer in self._quantisation.held:
            data = self._file.read(part.source, part.rows, part.columns)
            return data.view(self._quantisation.held[layer].storage.dtype)
        else:
            data = _slice(self._values(part.source, part.rows), None, part.columns)
        return data.to(torch.float32 if part.source in self._exact else self._weight_dtype)

    def input_scale(self, name: str) -> torch.Tensor | None:
        """What the layer of a weight multiplies its input by (columns,); None: by nothing.

        It is in the values of a weight that is held dequantised.
        """
        weight = self._quantisation.weights.get(name)
        if weight is None or "pre_quant_scale" not in weight.tensors:
            return None
        (scale,) = self._companion(weight.tensors["pre_quant_scale"])
        return scale.clone()

    def _values(self, name: str, rows: tuple[int, int]) -> torch.Tensor:
        """Rows of a quantised weight, in fp32; all of each, since they may be rotated."""
        weight = self._quantisation.weights[name]
        stored = self._file.read(name, rows, None)
        tensors = {"weight": stored.view(weight.format.storage.dtype)}
        for kind, stored_name in weight.tensors.items():
            of_rows = kind in ("weight_scale", "block_scale")
            tensors[kind] = _slice(self._companion(stored_name), rows if of_rows else None, None)
        return smoothed(dequantised(weight.format, tensors, torch.float32), tensors)

    def _companion(self, stored: str) -> torch.Tensor:
        """All of a companion. The parts of a weight come one after another: the last is kept."""
        if self._last[0] != stored:
            weight, name = self._companions[stored]
            values = self._file.read(stored, None, None)
            self._last = stored, companion_values(weight, name, values)
        return self._last[1]


def _slice(
    values: torch.Tensor, rows: tuple[int, int] | None, columns: tuple[int, int] | None
) -> torch.Tensor:
    if rows is not None:
        values = values[slice(*rows)]
    return values if columns is None else values[:, slice(*columns)]
