"""Puts vLLM's parallel layers in place of a model's linears, as its plan says. Rank half."""

import torch
import torch.nn.functional as F
from torch import nn
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

from .parts import Layer
from .plan import QKV, Column, MergedColumn, Row


class GatheredColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel with the outputs put together again, less the rows that only pad."""

    def __init__(self, in_features: int, out_features: int, padded: int, **kwargs: object) -> None:
        super().__init__(in_features, padded, gather_output=True, **kwargs)
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) → (..., out_features), equal on every rank."""
        return super().forward(x)[..., : self.out_features]


class _CastLinearMethod(UnquantizedLinearMethod):
    """A linear whose weight is held in another dtype than it computes in: cast up at use."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        cast_bias = None if bias is None else bias.to(x.dtype)
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return F.linear(x, weight.to(x.dtype), cast_bias)


class CastAtUse(QuantizationConfig):
    """vLLM's seam for how a linear stores and multiplies its weight."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:  # noqa: ARG002
        return _CastLinearMethod() if isinstance(layer, LinearBase) else None

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


def replace_linears(
    model: nn.Module,
    layers: list[Layer],
    tp_size: int,
    weight_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> None:
    """Replace the linears in place by vLLM's layers, on the meta device.

    Needs the tensor-parallel group. Afterwards no ``nn.Linear`` is left.
    """
    quant_config = None if weight_dtype == compute_dtype else CastAtUse()
    for layer in layers:
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
    left = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert not left, f"still nn.Linear: {left}"


def _build(
    layer: Layer, tp_size: int, weight_dtype: torch.dtype, quant_config: QuantizationConfig | None
) -> LinearBase:
    in_features, out_features = layer.full
    style = layer.match.style
    padded = [block.split.local(tp_size) * tp_size for block in layer.blocks]
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
    if isinstance(style, MergedColumn):
        return MergedColumnParallelLinear(in_features, padded, **common)
    if isinstance(style, Column) and style.gather:
        return GatheredColumnParallelLinear(in_features, out_features, padded[0], **common)
    if isinstance(style, Column):
        return ColumnParallelLinear(in_features, padded[0], **common)
    if isinstance(style, Row):
        return RowParallelLinear(sum(padded), out_features, input_is_parallel=True, **common)
    return ReplicatedLinear(in_features, out_features, **common)


def _delete(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
