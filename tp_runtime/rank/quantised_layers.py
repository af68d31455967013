"""How vLLM's parallel layers hold and multiply quantised weights."""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from ..formats import E4M3, INT8, W4A4, W4A8, LayerFormat
from .quantised_arithmetic import codes_of, product


class QuantisedLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is held as the file has it, with a parameter for each companion.

    ``fast``: products on tensor cores that multiply int8 or fp8, where the GPU has them.
    """

    def __init__(self, layer_format: LayerFormat, fast: bool) -> None:
        super().__init__()
        self.layer_format = layer_format
        self._fast = fast and not layer_format.full_precision
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
        if self._fast and self.layer_format.name in (E4M3, INT8, W4A4, W4A8):
            from ..gpu import quantised_products as products  # here: without a GPU, no Triton

            weight = tensors["weight"]
            if self.layer_format.name != E4M3:
                weight = codes_of(self.layer_format, tensors, self._linears)
            if products.can_multiply(weight.dtype, x, weight):
                scale, rotation = tensors["weight_scale"], self.layer_format.rotation
                return products.product(x, weight, scale, cast_bias, rotation)
        # In plain torch a GPU multiplies integers more slowly than floats.
        return product(
            self.layer_format, tensors, x, cast_bias, self._linears, of_integers=not x.is_cuda
        )


class CastLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is held in another dtype than it computes in: cast up at use.

    ``fast``: a weight in e4m3 is multiplied in fp8, where the GPU has tensor cores for it.
    """

    def __init__(self, fast: bool) -> None:
        super().__init__()
        self._fast = fast

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(..., this rank's inputs) → (..., its outputs)."""
        cast_bias = None if bias is None else bias.to(x.dtype)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        if self._fast and weight.dtype == torch.float8_e4m3fn:
            from ..gpu import quantised_products as products

            if products.can_multiply(weight.dtype, x, weight):
                one = torch.ones(len(weight), dtype=torch.float32, device=x.device)
                return products.product(x, weight, one, cast_bias)
        return F.linear(x, weight.to(x.dtype), cast_bias)
