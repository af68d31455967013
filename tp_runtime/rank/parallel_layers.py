"""Puts vLLM's parallel layers in place of a model's linears, as its plan says."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ..gpu.graphs import fused, optimising
from ..sharding.parts import SCALE, Layer, Sharding
from ..sharding.plan import QKV, Column, MergedColumn, Row


class GatheredColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel with the outputs put together again, less the rows that only pad."""

    def __init__(self, in_features: int, out_features: int, padded: int, **kwargs: object) -> None:
        super().__init__(in_features, padded, gather_output=True, **kwargs)
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) → (..., out_features), equal on every rank."""
        return super().forward(x)[..., : self.out_features]


class ExactRowParallelLinear(RowParallelLinear):
    """Row-parallel; while speed is not asked for, the sum over more than two ranks is in fp32.

    Every addition in bf16 rounds: on four ranks that doubles what rounding costs the result.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., this rank's features) → (..., out_features), equal on every rank."""
        if self.tp_size <= 2 or optimising():
            return super().forward(x)
        bias = self.bias if self.tp_rank == 0 else None
        part = self.quant_method.apply(self, x, bias)
        return tensor_model_parallel_all_reduce(part.float()).to(part.dtype)


class _CastLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is held in another dtype than it computes in: cast up at use."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        cast_bias = None if bias is None else bias.to(x.dtype)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return F.linear(x, weight.to(x.dtype), cast_bias)


class _ScaledLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is held in fp8 and multiplied by a scale, one a row, at use."""

    def __init__(self, stored_dtype: torch.dtype) -> None:
        super().__init__()
        self.stored_dtype = stored_dtype

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
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            self.stored_dtype,
            **extra,
        )
        scale = torch.empty(sum(output_partition_sizes), dtype=torch.float32)
        layer.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        cast_bias = None if bias is None else bias.to(x.dtype)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        scale: torch.Tensor = layer.weight_scale  # type: ignore[assignment]
        return F.linear(x, _dequantised(weight, scale, x.dtype), cast_bias)


@fused
def _dequantised(
    weight: torch.Tensor, scale: torch.Tensor, compute_dtype: torch.dtype
) -> torch.Tensor:
    return (weight.to(torch.float32) * scale[:, None]).to(compute_dtype)


class CastAtUse(QuantizationConfig):
    """vLLM's seam for how a linear stores and multiplies its weight.

    ``scaled_dtype``: the dtype of weights with a scale; None for weights without.
    """

    def __init__(self, scaled_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.scaled_dtype = scaled_dtype

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:  # noqa: ARG002
        if not isinstance(layer, LinearBase):
            return None
        if self.scaled_dtype is not None:
            return _ScaledLinearMethod(self.scaled_dtype)
        return _CastLinearMethod()

    def get_name(self) -> str:
        return "cast_at_use"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, object]) -> "CastAtUse":  # noqa: ARG003
        return cls()


def shard_module(
    model: nn.Module,
    sharding: Sharding,
    tp_size: int,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    scaled: Mapping[str, torch.dtype],
) -> None:
    """Replace the linears in place by vLLM's layers, and shorten vectors that are split.

    All on the meta device.

    ``scaled``: path of a layer whose weight has a scale → the dtype that it is held in; these have
    a parameter ``weight_scale`` (out_features,) fp32. All others are held in ``weight_dtype``.

    Needs the tensor-parallel group. Afterwards no ``nn.Linear`` is left.
    """
    plain = None if weight_dtype == compute_dtype else CastAtUse()
    for layer in sharding.layers:
        quant_config = CastAtUse(scaled[layer.path]) if layer.path in scaled else plain
        with torch.device("meta"):
            built = _build(layer, tp_size, weight_dtype, quant_config)
        for path in set(layer.replaced) - {layer.path}:
            _delete(model, path)
        # A linear that keeps its name is overwritten: deleted and set again, it would come last
        # in an nn.Sequential.
        parent, _, name = layer.path.rpartition(".")
        setattr(model.get_submodule(parent), name, built)
        in_features, out_features = layer.local(tp_size)
        assert built.weight.shape == (out_features, in_features), layer.path
    for name, split in sharding.vectors.items():
        parent, _, parameter = name.rpartition(".")
        module = model.get_submodule(parent)
        whole = module.get_parameter(parameter)
        length = split.local(tp_size)
        short = nn.Parameter(whole.new_empty(length), requires_grad=False)
        setattr(module, parameter, short)
    left = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert not left, f"still nn.Linear: {left}"


def _build(
    layer: Layer, tp_size: int, weight_dtype: torch.dtype, quant_config: QuantizationConfig | None
) -> LinearBase:
    in_features, out_features = layer.full
    style = layer.match.style
    padded = [section.split.local(tp_size) * tp_size for section in layer.sections]
    common = {
        "bias": layer.bias,
        "params_dtype": weight_dtype,
        "quant_config": quant_config,
        "prefix": layer.path,
        "return_bias": False,
    }
    if isinstance(style, QKV):
        q, kv, _ = style.splits()
        shared = kv.shared and tp_size > kv.count
        return QKVParallelLinear(
            in_features,
            style.head_dim,
            q.local_count(tp_size) * tp_size,
            kv.count if shared else kv.local_count(tp_size) * tp_size,
            **common,
        )
    if isinstance(style, MergedColumn) or (isinstance(style, Column) and len(padded) > 1):
        return MergedColumnParallelLinear(in_features, padded, **common)
    if isinstance(style, Column) and style.gather:
        return GatheredColumnParallelLinear(in_features, out_features, padded[0], **common)
    if isinstance(style, Column):
        return ColumnParallelLinear(in_features, padded[0], **common)
    if isinstance(style, Row):
        return ExactRowParallelLinear(sum(padded), out_features, input_is_parallel=True, **common)
    return ReplicatedLinear(in_features, out_features, **common)


def _delete(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
