"""Puts vLLM's parallel layers in place of a model's linears, as its plan says."""

from collections.abc import Mapping

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from ..formats import LayerFormat
from ..gpu.graphs import optimising
from ..sharding.parts import Layer, Sharding
from ..sharding.plan import QKV, Column, MergedColumn, Row
from .quantised_layers import CastLinearMethod, QuantisedLinearMethod


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


class CastAtUse(QuantizationConfig):
    """vLLM's seam for how a linear stores and multiplies its weight.

    ``layer_format``: of a quantised weight; None: a plain one in another dtype than the layer's.
    ``fast``: with products in int8 or fp8, where the GPU has them.
    """

    def __init__(self, layer_format: LayerFormat | None = None, fast: bool = False) -> None:
        super().__init__()
        self.layer_format = layer_format
        self.fast = fast

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:  # noqa: ARG002
        if not isinstance(layer, LinearBase):
            return None
        if self.layer_format is not None:
            return QuantisedLinearMethod(self.layer_format, self.fast)
        return CastLinearMethod(self.fast)

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
    quantised: Mapping[str, LayerFormat],
    fast: bool,
    fast_plain: bool,
) -> None:
    """Replace the linears in place by vLLM's layers, and shorten vectors that are split.

    All on the meta device.

    ``quantised``: path of a layer → the format that its weight is held in, with a parameter for
    each companion. All others are held in ``weight_dtype``. ``fast``, ``fast_plain``: products with
    quantised ones, and with plain ones in fp8, may be in int8 and fp8.

    Needs the tensor-parallel group. Afterwards no ``nn.Linear`` is left.
    """
    plain = None if weight_dtype == compute_dtype else CastAtUse(fast=fast_plain)
    for layer in sharding.layers:
        layer_format = quantised.get(layer.path)
        quant_config = plain if layer_format is None else CastAtUse(layer_format, fast)
        with torch.device("meta"):
            built = _build(layer, tp_size, weight_dtype, quant_config)
        for path in set(layer.replaced) - {layer.path}:
            _delete(model, path)
        # A linear that keeps its name is overwritten: deleted and set again, it would come last
        # in an nn.Sequential.
        parent, _, name = layer.path.rpartition(".")
        setattr(model.get_submodule(parent), name, built)
        in_features, out_features = layer.local(tp_size)
        packed = 1 if layer_format is None else layer_format.storage.packed
        assert built.weight.shape == (out_features, in_features // packed), layer.path
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
