"""What the running ComfyUI gives its own models: our forwards take it, or refuse it by name."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.newer import is_known, known
from support.pack import pack_module
from support.tiny_models import write_tiny
from tp_runtime import models
from tp_runtime.client import GroupConfig

pytestmark = pytest.mark.comfy

FAMILIES = models.families()


@pytest.fixture(scope="module")
def loading() -> Iterator[ModuleType]:
    with pack_module("nodes.model") as module:
        yield module


def proxy(loading: ModuleType, family: str, folder: Path) -> Any:
    """The weightless model of a tiny file."""
    if not is_known(family):
        pytest.skip(f"this ComfyUI has no class for {family}: {FAMILIES[family].since} has")
    path = write_tiny(family, folder / f"{family}.safetensors")
    placement = loading.Placement()
    group = GroupConfig(2, "cpu")
    patcher = loading.load_model(str(path), torch.float32, group, placement, "auto")
    return patcher.model.diffusion_model


def native_inputs(native: type) -> set[str]:
    """The parameters of a class's forward, and what it looks up among its keyword arguments."""
    found: set[str] = set()
    for method in (native.forward, native._forward):  # type: ignore[attr-defined]
        for name, parameter in inspect.signature(method).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.add(name)
        for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            match call:
                case ast.Call(
                    ast.Attribute(ast.Name("kwargs"), "get"), [ast.Constant(str(name)), *_]
                ):
                    found.add(name)
    return found - {"self"}


@pytest.mark.parametrize("family", known())
def test_every_input_of_the_native_class_is_known(
    loading: ModuleType, family: str, tmp_path: Path
) -> None:
    native = type(proxy(loading, family, tmp_path).skeleton)
    forward = FAMILIES[family].forward()
    taken = {"timestep", "timesteps", "control", "transformer_options"}
    taken |= {*FAMILIES[family].small.unused_inputs}
    taken |= inspect.signature(forward.condition).parameters.keys()
    inputs = native_inputs(native)
    assert {"x", "context", "transformer_options"} <= inputs
    assert inputs - taken - FAMILIES[family].refused_inputs.keys() == set()


def test_nothing_is_refused_that_the_forward_takes() -> None:
    for family in FAMILIES.values():
        taken = inspect.signature(family.forward().condition).parameters
        assert not family.refused_inputs.keys() & taken.keys()


def test_a_refused_input_is_said_by_name_and_version(loading: ModuleType, tmp_path: Path) -> None:
    from comfyui_version import __version__

    model = proxy(loading, "qwen_image", tmp_path)
    x, context = torch.zeros(1, 16, 1, 8, 8), torch.zeros(1, 4, 64)
    refused = ("guidance", "additional_t_cond")  # the first until 0.33, which knows the second
    name = next(one for one in refused if one in model.native_signature.parameters)
    with pytest.raises(ValueError, match=rf"'{name}': .*ComfyUI {__version__} .*stock"):
        model(x, torch.ones(1), context, **{name: torch.ones(1)})
