"""Nothing in ComfyUI's process computes with weights that are not there.

It gets the true values, of what lies outside of the blocks, or an error that names who asked.
"""

import inspect
import io
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support.inputs import make_inputs
from support.newer import known
from support.pack import pack_module
from support.tiny_models import tiny, write_tiny
from tp_runtime.client import TPRuntimeError, checkpoint_info


def cast_as_comfyui_does(weight: torch.Tensor) -> object:
    import comfy.model_management

    return comfy.model_management.cast_to(weight, torch.float32, torch.device("cpu"))


# What code may do with a weight in order to see its numbers, or to compute with them.
USES: dict[str, Callable[[torch.Tensor], object]] = {
    "cast_to": cast_as_comfyui_does,
    "+": lambda weight: weight + 1,
    "to": lambda weight: weight.to(torch.float16),
    "cpu": lambda weight: weight.cpu(),
    "clone": lambda weight: weight.clone(),
    "empty_like": lambda weight: torch.empty_like(weight).shape,
    "copy_": lambda weight: torch.zeros(weight.shape).copy_(weight),
    "out": lambda weight: torch.zeros(weight.shape, out=weight),
    "cat": lambda weight: torch.cat([torch.zeros(1), weight.flatten()]),
    "stack": lambda weight: torch.stack([torch.zeros(weight.shape), weight]),
    "data": lambda weight: weight.data,
    "data_ptr": lambda weight: weight.data_ptr(),
    "storage": lambda weight: weight.untyped_storage(),
    "numpy": lambda weight: weight.numpy(),
    "tolist": lambda weight: weight.tolist(),
    "==": lambda weight: weight == 0,
    "save": lambda weight: torch.save(weight, io.BytesIO()),
    "add_": lambda weight: weight.add_(1),
    "+=": lambda weight: operator.iadd(weight, 1),
    "[...] =": lambda weight: operator.setitem(weight, ..., 0),
    "data =": lambda weight: setattr(weight, "data", torch.zeros(weight.shape)),
}
# Nothing here may change a weight, whose shards would not be changed, nor ask for the place of its
# numbers.
NEVER = ("out", "data_ptr", "storage", "save", "add_", "+=", "[...] =", "data =")


@pytest.fixture(scope="module")
def absent() -> Iterator[ModuleType]:
    with pack_module("nodes.absent") as module:
        yield module


@pytest.fixture(scope="module", params=known())
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(family, tmp_path_factory.mktemp(family) / "model.safetensors")


@pytest.fixture(scope="module")
def true(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors outside of its blocks, by the names of ComfyUI's model."""
    outside = checkpoint_info(str(path)).sizes.table.outside
    return {name: tensor for name, tensor in load_file(path).items() if name in outside}


@pytest.fixture(scope="module", params=["", "dynamic VRAM"])
def skeleton(request: pytest.FixtureRequest, path: Path) -> Iterator[torch.nn.Module]:
    """ComfyUI's model of the family's tiny file, as a MODEL of ours has it.

    Also where ComfyUI's own layers have no weights until a file is loaded, as 0.33's with a GPU.
    """
    with pack_module("nodes.skeleton") as module, pytest.MonkeyPatch.context() as patch:
        if request.param:
            memory = pytest.importorskip("comfy.memory_management", reason="not in this ComfyUI")
            patch.setattr(memory, "aimdo_enabled", True)
        built: torch.nn.Module = module.build_skeleton(
            checkpoint_info(str(path)), torch.float32
        ).diffusion_model
        yield built


class _Sealed(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        raise AssertionError(f"{name} is set")


def test_comfyuis_own_settings_are_left_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages ask from threads of their own, and what is set meanwhile would be another's."""
    memory = pytest.importorskip("comfy.memory_management", reason="not in this ComfyUI")
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    memory.__class__ = _Sealed
    try:
        with pack_module("nodes.skeleton") as module:
            built = module.build_skeleton(checkpoint_info(str(path)), torch.float32).diffusion_model
    finally:
        object.__setattr__(memory, "__class__", ModuleType)
    assert all(weight.shape for _, weight in weights(built) if weight.ndim > 1)


def weights(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return type(found) is torch.Tensor and torch.equal(found, expected)
    return bool(np.array_equal(found, expected))


def test_every_weight_has_its_true_value_or_refuses(
    skeleton: torch.nn.Module, true: dict[str, torch.Tensor]
) -> None:
    """Each use with the first of either kind, since all of one are alike; two with every one."""
    assert len(weights(skeleton)) > 20
    given, refused = set(), set()
    for name, weight in weights(skeleton):
        kind = given if name in true else refused
        for use in ("cast_to", "data") if kind else USES:
            if name in true and use not in NEVER:
                assert same(USES[use](weight), USES[use](true[name])), (name, use)
                continue
            with pytest.raises(TPRuntimeError) as raised:
                USES[use](weight)
            assert f" uses the weight '{name}' of the model in " in str(raised.value)
        kind.add(name)
    assert given == true.keys() & {name for name, _ in weights(skeleton)}
    assert len(given) > 3
    assert len(refused) > 3


def test_every_layer_computes_as_it_would_or_refuses(
    skeleton: torch.nn.Module, true: dict[str, torch.Tensor]
) -> None:
    inputs: dict[type, Callable[[Any], torch.Tensor]] = {
        torch.nn.Linear: lambda layer: torch.zeros(2, layer.in_features),
        torch.nn.LayerNorm: lambda layer: torch.zeros(2, *layer.normalized_shape),
        torch.nn.Conv2d: lambda layer: torch.zeros(1, layer.in_channels, *layer.kernel_size),
        torch.nn.Conv3d: lambda layer: torch.zeros(1, layer.in_channels, *layer.kernel_size),
    }
    called = set()
    for name, layer in skeleton.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if not own or type(layer) is type(skeleton):
            continue
        make = next((make for kind, make in inputs.items() if isinstance(layer, kind)), None)
        if make is None and own.keys() <= {"weight", "scale"}:  # a norm of ComfyUI's own
            make = lambda layer: torch.zeros(2, *next(layer.parameters()).shape)  # noqa: E731
        if make is None:
            continue  # it computes with what the test of every weight has tried
        called.add(type(layer))
        x = torch.randn_like(make(layer))
        own_true = {key: true[f"{name}.{key}"] for key in own if f"{name}.{key}" in true}
        if own_true.keys() == own.keys():
            plain = {key: torch.nn.Parameter(value) for key, value in own_true.items()}
            found = layer(x)
            assert type(found) is torch.Tensor
            expected = torch.func.functional_call(layer, plain, x)
            torch.testing.assert_close(found, expected)  # its last bits go by where x lies
            continue
        with pytest.raises(TPRuntimeError) as raised:
            layer(x)
        assert str(raised.value).startswith("test_every_layer_computes_as_it_would_or_refuses (")
        assert f" uses the weight '{name}." in str(raised.value)
    assert len(called) > 1


def test_the_whole_model_refuses_to_compute(skeleton: torch.nn.Module, family: str) -> None:
    inputs = make_inputs(tiny(family))
    _, _, *others = inspect.signature(skeleton.forward).parameters.values()
    for parameter in others:
        if parameter.kind is not parameter.VAR_KEYWORD and parameter.default is parameter.empty:
            inputs.setdefault(parameter.name, 20)  # a count
    with pytest.raises(TPRuntimeError, match=r"^test_the_whole_model.* uses the weight"):
        skeleton(inputs.pop("x"), inputs.pop("timesteps"), **inputs)


def test_no_tensor_is_left_without_numbers(skeleton: torch.nn.Module, absent: ModuleType) -> None:
    """Also none that a module keeps as a plain attribute."""

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from (one for item in value.values() for one in tensors(item))
        elif isinstance(value, list | tuple):
            yield from (one for item in value for one in tensors(item))

    for name, module in skeleton.named_modules():
        for tensor in tensors(vars(module)):
            assert isinstance(tensor, absent.AbsentWeight) or not tensor.is_meta, name


def test_what_is_known_without_numbers(
    skeleton: torch.nn.Module, true: dict[str, torch.Tensor]
) -> None:
    """Nodes and LoRA loaders ask for it; ControlNets pass weights on."""
    state_dict = skeleton.state_dict()
    for name, weight in skeleton.named_parameters():
        assert isinstance(weight, torch.nn.Parameter)
        assert state_dict[name].shape == weight.shape == weight.size()
        assert weight.numel() * weight.element_size() == weight.nbytes
        assert weight.dtype.is_floating_point
        assert weight.is_floating_point()
        assert weight.device.type == "meta"
        assert len(weight) == weight.shape[0]
        assert hash(weight) == hash(weight)
        assert name in repr(weight)
        if name in true:
            continue
        moved = torch.nn.Linear(1, 1)
        moved.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(TPRuntimeError, match="uses the weight"):
            moved(torch.zeros(1, 1))
    assert sum(1 for _ in skeleton.parameters()) == len(list(skeleton.named_parameters()))


class Node:
    """As one of a node pack."""

    def execute(self, model: torch.nn.Module) -> object:
        in_blocks = [weight for name, weight in model.named_parameters() if "blocks.0." in name]
        return (in_blocks or list(model.layers.parameters()))[0] * 2


def test_the_one_who_asks_is_named(skeleton: torch.nn.Module) -> None:
    """With the pack that it comes from, as in other refusals."""
    pack = {"__name__": "/somewhere/custom_nodes/some-pack"}
    execute = FunctionType(Node.execute.__code__, pack)
    with pytest.raises(
        TPRuntimeError, match=r"^Node \(of the node pack some-pack\) uses the weight"
    ):
        execute(Node(), skeleton)
