"""How vLLM's parallel layers hold and multiply quantised weights."""

import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from ..formats import LayerFormat
from .quantised_arithmetic import product


class QuantisedLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is held as the file has it, with a parameter for each companion."""

    def __init__(self, layer_format: LayerFormat) -> None:
        super().__init__()
        self.layer_format = layer_format
        self._linears: list[int] = []  # rows of each linear that the layer stands for

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,  # noqa: ARG002  (the bias's)
        **extra: object,
    ) -> None:
        storage = self.layer_format.storage
        super().create_weights(
            layer,
            input_size_per_partition // storage.packed,
            output_partition_sizes,
            input_size // storage.packed,
            output_size,
            storage.dtype,
            **extra,
        )
        self._linears = list(output_partition_sizes)
        shape = sum(output_partition_sizes), input_size_per_partition
        for name in self.layer_format.companions:
            values = torch.empty(
                self.layer_format.companion_shape(name, shape, len(self._linears)),
                dtype=self.layer_format.companion_dtype(name),
            )
            layer.register_parameter(name, nn.Parameter(values, requires_grad=False))

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., this rank's inputs) → (..., its outputs)."""
        tensors = {name: getattr(layer, name) for name in ("weight", *self.layer_format.companions)}
        cast_bias = None if bias is None else bias.to(x.dtype)
        return product(self.layer_format, tensors, x, cast_bias, self._linears)
