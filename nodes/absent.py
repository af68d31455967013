"""Weights that ComfyUI's process does not have: their names, shapes and dtypes.

What computes with one, or reads it, would get memory that nobody has written. So it gets the true
value, of a weight outside of the blocks (`outer_weights.py`), or an error that names who did it.
"""

import sys
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch

from .outer_weights import OuterWeights
from .unsupported import absent_weight

# What is asked of a weight that is known without its numbers; as torch hands it to a subclass.
_PROPERTIES = (
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "names",
        "itemsize",
        "nbytes",
        "grad",
        "grad_fn",
    ),
    *("requires_grad", "is_leaf", "is_meta", "is_cpu", "is_cuda", "is_sparse", "is_quantized"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset"),
    *("is_floating_point", "is_complex", "is_contiguous", "get_device", "__len__", "__hash__"),
)
_KNOWN = {
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES if hasattr(torch.Tensor, name)),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
# What gives the same weight again: `nn.Module` and ComfyUI do it when they pass a weight on.
_THE_SAME = {torch.Tensor.detach, torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}

# What would change a weight, which is not here, or gives the place of its numbers.
_WRITES = {"__setitem__", "__set__", "__delete__"}
_PLACES = {"data_ptr", "untyped_storage", "storage", "_typed_storage", "__dlpack__"}

# Modules that compute with what they are given: it is not they who want the weight.
_HELPERS = (
    *("torch", "comfy.ops", "comfy.quant_ops", "comfy.model_management", "comfy.utils"),
    *("comfy.float", "comfy.rmsnorm", "comfy.lora", "comfy.weight_adapter", "comfy_kitchen"),
    "comfy.patcher_extension",
)


class AbsentWeight(torch.Tensor):
    """A weight, or a buffer, without its numbers.

    Raises:
        UnsupportedFeatureError: in whatever function of torch it is used, unless it is one of the
            model's `OuterWeights` and is only read.
    """

    tp_name = ""
    tp_outer: OuterWeights | None = None

    @classmethod
    def like(
        cls, tensor: torch.Tensor, name: str, outer: OuterWeights | None = None
    ) -> "AbsentWeight":
        """What stands for a tensor that is called `name` in the model."""
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        made: AbsentWeight = torch.Tensor._make_subclass(cls, empty)
        made.tp_name = name
        if outer is not None and name in outer:
            made.tp_outer = outer
        if isinstance(tensor, torch.nn.Parameter):
            made._is_param = True  # to be one of nn.Module's parameters
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _THE_SAME:
            return args[0]
        if not _only_reads(func, args, kwargs or {}):
            raise absent_weight(_name_in(args, kwargs or {}), _user(sys._getframe(1)))
        args, kwargs = _with_values(args), _with_values(kwargs or {})
        if name := _name_in(args, kwargs):
            raise absent_weight(name, _user(sys._getframe(1)))
        return func(*args, **kwargs)

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"AbsentWeight({self.tp_name}, {list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise absent_weight(self.tp_name, _user(sys._getframe(1)))


def make_absent(model: torch.nn.Module, outer: OuterWeights) -> None:
    """Put `AbsentWeight`s into the place of all parameters and buffers."""
    for path, module in model.named_modules():
        module_name = f"{path}." if path else ""
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = AbsentWeight.like(tensor, module_name + name, outer)


def give_shapes(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Have absent weights look as if patches had made them that large, or small again."""
    for name, shape in shapes.items():
        path, _, parameter = name.rpartition(".")
        parameters = model.get_submodule(path)._parameters
        before = parameters[parameter]
        assert isinstance(before, AbsentWeight)
        larger = torch.empty(shape, dtype=before.dtype, device="meta")
        parameters[parameter] = AbsentWeight.like(
            torch.nn.Parameter(larger, requires_grad=False), name, before.tp_outer
        )


def _only_reads(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the function changes no weight, and does not ask where its numbers lie."""
    name = str(getattr(func, "__name__", ""))
    in_place = name.endswith("_") and not name.endswith("__")
    in_place |= name in _WRITES or (name.startswith("__i") and name not in ("__index__", "__int__"))
    is_first = bool(args) and isinstance(args[0], AbsentWeight)
    writes = (in_place and is_first) or isinstance(kwargs.get("out"), AbsentWeight)
    return not writes and name not in _PLACES


def _with_values(given: Any) -> Any:
    """The same with the true values of the weights that have one."""
    if isinstance(given, AbsentWeight):
        if given.tp_outer is None:
            return given
        return given.tp_outer.value(given.tp_name, given.dtype)
    if isinstance(given, dict):
        return {key: _with_values(value) for key, value in given.items()}
    if isinstance(given, list | tuple) and type(given) in (list, tuple):
        return type(given)(_with_values(value) for value in given)
    return given


def _name_in(args: Iterable[Any], kwargs: dict[str, Any]) -> str:
    for value in (*args, *kwargs.values()):
        if isinstance(value, AbsentWeight):
            return value.tp_name
        if isinstance(value, list | tuple) and (name := _name_in(value, {})):
            return name
    return ""


def _user(frame: FrameType | None) -> tuple[str, str]:
    """Module and qualified name of the function that wants the weight.

    That of the first that is neither a helper nor code of the model itself.
    """
    found = "", ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        code = frame.f_code
        if module != __name__ and not _is_helper(module):
            # Python 3.10 does not know the class.
            found = module, str(getattr(code, "co_qualname", code.co_name))
            is_of_model = module.startswith("comfy.ldm.") or _is_of_model(
                frame.f_locals.get("self")
            )
            if not is_of_model:
                return found
        frame = frame.f_back
    return found


def _is_helper(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in _HELPERS)


def _is_of_model(owner: Any) -> bool:
    """Whether it is a module of a model whose weights are absent."""
    if not isinstance(owner, torch.nn.Module):
        return False
    return isinstance(next(owner.parameters(), None), AbsentWeight)
